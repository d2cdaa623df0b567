"""Questions put to the toy demo model, cut into stages, and what it answers."""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.table import Table

from engine.config import EngineConfig
from engine.demo_model import DEMO_MODEL_PATH
from engine.engine import Engine
from queue_api.wire.schemas import ChatMessage, GenerationRequest, SamplingParams

QUESTIONS = [
    "What is 12 + 30?",
    "What is 9 - 4?",
    "What number comes after 41?",
    "Which is larger, 17 or 71?",
    "Which day comes after Monday?",
    "Reverse the word LAMP.",
    "Count the words: fox, bell, mill.",
    "Tell a story with a fox and a bell.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", default=str(DEMO_MODEL_PATH))
    parser.add_argument("--stages", default="cpu,cpu", help="a device per stage")
    parser.add_argument("--max-tokens", type=int, default=96)
    args = parser.parse_args()
    engine = Engine.load(EngineConfig(args.model, devices=tuple(args.stages.split(","))))
    params = SamplingParams(max_tokens=args.max_tokens)
    requests = [
        GenerationRequest(
            id=str(i), messages=[ChatMessage(role="user", content=text)], sampling=params
        )
        for i, text in enumerate(args.questions)
    ]
    started = time.perf_counter()
    completions = engine.generate(requests)
    took_s = time.perf_counter() - started
    layers = "; ".join(
        f"layers {s.spec.first_layer}-{s.spec.end_layer - 1} on {s.device}" for s in engine.stages
    )
    table = Table(title=f"{engine.model_name}: {layers}")
    for column in ("question", "answer", "tokens", "ends by"):
        table.add_column(column)
    for question, done in zip(args.questions, completions, strict=True):
        table.add_row(question, done.text, str(done.completion_tokens), done.finish_reason.value)
    console = Console()
    console.print(table)
    num_tokens = sum(done.completion_tokens for done in completions)
    console.print(f"{num_tokens} tokens in {took_s:.2f} s ({num_tokens / took_s:.0f} tokens/s)")
    engine.close()


if __name__ == "__main__":
    main()
