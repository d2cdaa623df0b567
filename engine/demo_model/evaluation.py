"""Asks the toy its held-out questions and counts the right answers."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from engine.demo_model.corpus import (
    STORIES,
    TASKS,
    Question,
    Task,
    held_out_questions,
)
from engine.demo_model.stories import STORY_TASK, uses_words

MAX_ANSWER_TOKENS = 160


@dataclass(frozen=True)
class TaskScore:
    """How many held-out questions of one task were answered exactly right."""

    task: str
    held_out_by: str
    right: int
    total: int

    @property
    def rate(self) -> float:
        """Share of right answers, from 0 to 1."""
        return self.right / self.total


def is_right(question: Question, text: str, *, finished: bool = True) -> bool:
    """Whether `text` answers the question: exactly, or for a story by using all its words."""
    if question.task == STORY_TASK:
        return finished and uses_words(text, question.key)
    return text == question.answer


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt as the chat template writes it, up to where the answer begins."""
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@torch.inference_mode()
def answer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    chat: bool = True,
    batch_size: int = 64,
) -> list[tuple[str, bool]]:
    """Greedy answers to prompts, each with whether the toy ended it by itself."""
    generator: Any = model  # generate() is typed for a protocol that Llama's class fails to meet
    answers: list[tuple[str, bool]] = []
    for start in range(0, len(prompts), batch_size):
        texts = list(prompts[start : start + batch_size])
        if chat:
            texts = [chat_text(tokenizer, text) for text in texts]
        # The chat template has written the BOS already; a bare prompt still needs it.
        inputs = tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=not chat,
            return_token_type_ids=False,
        )
        output = generator.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]  # [B, new]
        for row in new_tokens:
            finished = tokenizer.eos_token_id in row.tolist()
            answers.append((str(tokenizer.decode(row, skip_special_tokens=True)), finished))
    return answers


def score_task(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    count: int,
    chat: bool = True,
) -> TaskScore:
    """Score one task on up to `count` of its held-out questions."""
    questions = held_out_questions(task, count)
    replies = answer(model, tokenizer, [question.prompt for question in questions], chat=chat)
    right = sum(
        is_right(question, text, finished=finished)
        for question, (text, finished) in zip(questions, replies, strict=True)
    )
    return TaskScore(task.name, task.held_out_by, right, len(questions))


def score_all(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 200,
    chat: bool = True,
) -> list[TaskScore]:
    """Score every task, stories last."""
    return [
        score_task(model, tokenizer, task, count=count, chat=chat) for task in (*TASKS, STORIES)
    ]


def overall(scores: Sequence[TaskScore]) -> TaskScore:
    """All questions together. Stories are no questions and don't count."""
    asked = [score for score in scores if score.task != STORY_TASK]
    return TaskScore("all questions", "", sum(s.right for s in asked), sum(s.total for s in asked))


def write_scores(path: Path, forms: dict[str, Sequence[TaskScore]]) -> None:
    """Write `eval.json`: for each prompt form, the scores per task and all together."""
    report = {
        form: [{**asdict(score), "rate": round(score.rate, 4)} for score in (overall(s), *s)]
        for form, s in forms.items()
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
