"""Writes the example dataset: held-out questions and stories, in the forms a dataset may take.

`python -m engine.demo_model.examples --out examples/prompts.jsonl` writes the same file each time.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from engine.demo_model.corpus import STORIES, TASKS, Question, held_out_questions
from engine.demo_model.stories import STORY_TASK

QUESTIONS_PER_TASK = 10
NUM_STORIES = 50


def example_rows(seed: int = 0) -> list[dict[str, Any]]:
    """240 rows: `id`, `prompt` or `messages`, at times sampling fields, `expected` if checkable."""
    rng = Random(seed)
    questions = [q for task in TASKS for q in held_out_questions(task, QUESTIONS_PER_TASK)]
    questions += held_out_questions(STORIES, NUM_STORIES)
    rng.shuffle(questions)
    return [_row(number, question, rng) for number, question in enumerate(questions)]


def _row(number: int, question: Question, rng: Random) -> dict[str, Any]:
    row: dict[str, Any] = {"id": f"{number:03d}-{question.task.replace(' ', '-')}"}
    if rng.random() < 0.5:
        row["prompt"] = question.prompt
    else:
        row["messages"] = [{"role": "user", "content": question.prompt}]
    if question.task == STORY_TASK:
        return row | _story_sampling(rng)
    if rng.random() < 0.2:
        row["max_tokens"] = 32
    return row | {"expected": question.answer}


def _story_sampling(rng: Random) -> dict[str, Any]:
    """Sampling fields of a story: greedy, drawn with a seed, or cut after its first sentence."""
    kind = rng.choice(("greedy", "drawn", "cut"))
    if kind == "greedy":
        return {"max_tokens": 160}
    if kind == "drawn":
        return {"max_tokens": 160, "temperature": 0.8, "seed": rng.randrange(1000)}
    return {"max_tokens": 160, "stop": [". "]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the rows as JSONL."""
    parser = argparse.ArgumentParser(description="Write the example dataset.")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    options = parser.parse_args(arguments)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in example_rows())
    options.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
