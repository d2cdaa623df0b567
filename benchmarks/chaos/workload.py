"""What is asked for: parts, each with a client, a queue and rows of its own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from queue_api.store.runs import run_of_call

__all__ = ["DEMO_QUEUE", "ECHO_QUEUE", "Part", "make_parts"]

Row = dict[str, Any]
ECHO_QUEUE, DEMO_QUEUE = "echo", "demo"
MOST_TOKENS = 20
"""Of an echoed request; the number is drawn between one and this."""
WAVE = 1000
"""Requests that the submitting client puts into one run."""
TOO_MANY_WORDS = 4100
PROMPTS = Path(__file__).resolve().parents[2] / "examples/prompts.jsonl"
_WORDS = [
    "anchor",
    "basket",
    "cave",
    "forest",
    "harbor",
    "lion",
    "mirror",
    "orange",
    "river",
    "tower",
    "village",
    "wolf",
]


@dataclass(frozen=True)
class Part:
    """Rows that one client has answered.

    `calls` asks for each by `generate` with an id; `waves` submits runs one after another and
    reads their results; `rows` is `batchmill run` from file to file.
    """

    name: str
    client: Literal["calls", "waves", "rows"]
    queue: str
    rows: list[Row]

    def runs(self) -> Iterator[tuple[str, list[Row]]]:
        """The runs that these rows are in, by name."""
        if self.client == "calls":
            for row in self.rows:
                yield run_of_call(self.queue, row["id"]), [row]
        elif self.client == "waves":
            for start in range(0, len(self.rows), WAVE):
                yield f"{self.name}-{start // WAVE}", self.rows[start : start + WAVE]
        else:
            yield self.name, self.rows

    def save(self, folder: Path) -> Path:
        """Write the rows as JSON lines."""
        path = folder / f"{self.name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        return path


def make_parts(seed: int, num_requests: int, num_demo: int) -> list[Part]:
    """The same parts for the same seed."""
    draw = random.Random(seed)
    num_echo = num_requests - num_demo
    num_calls = num_echo // 20
    num_waves = num_echo // 2
    num_lines = num_echo - num_calls - num_waves
    parts = [
        Part("calls", "calls", ECHO_QUEUE, _echo_rows(draw, "call", num_calls, valid_only=True)),
        Part("waves", "waves", ECHO_QUEUE, _echo_rows(draw, "wave", num_waves)),
        Part("lines", "rows", ECHO_QUEUE, _echo_rows(draw, "line", num_lines)),
    ]
    if num_demo:
        parts.append(Part("demo", "rows", DEMO_QUEUE, _demo_rows(draw, num_demo)))
    return parts


def _echo_rows(
    draw: random.Random, kind: str, count: int, *, valid_only: bool = False
) -> list[Row]:
    rows = []
    for number in range(count):
        words = draw.choices(_WORDS, k=draw.randint(1, 12))
        row: Row = {"id": f"{kind}-{number}", "prompt": f"{' '.join(words)} {number}"}
        row["max_tokens"] = draw.randint(1, MOST_TOKENS)
        # now and then one that is wrong: found by the client, or only by the worker
        luck = draw.random()
        if luck < 0.002 and not valid_only:
            row["max_tokens"] = 0
        elif luck < 0.004:
            row["prompt"] = "word " * TOO_MANY_WORDS
        rows.append(row)
    return rows


def _demo_rows(draw: random.Random, count: int) -> list[Row]:
    known = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    rows = []
    for number in range(count):
        chosen = draw.choice(known)
        row: Row = {key: chosen[key] for key in ("prompt", "messages") if key in chosen}
        row |= {"id": f"demo-{number}", "max_tokens": draw.choice([8, 16, 48, 120])}
        # greedy, seeded, and with the seed that follows from run and id
        row |= draw.choice([{}, {"temperature": 0.8, "seed": number}, {"temperature": 0.8}])
        row["ignore_eos"] = draw.random() < 0.5
        rows.append(row)
    return rows
