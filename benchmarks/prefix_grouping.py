"""What `--group-prefixes` saves: prompt tokens that two workers compute of a mixed few-shot file,
against the tokens in the trie of its prompts (each distinct prefix once), and the time it takes.

    python -m benchmarks.prefix_grouping [--rows 2400] [--prompts 6] [--shots 24] [--pairs 1]

The rows are shuffled in the file. Orders run in turns, on the bundled demo model.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.children import environment, module
from engine.config import EngineConfig
from engine.demo_model import DEMO_MODEL_PATH
from engine.demo_model.corpus import TASKS, draw_question
from engine.loading import load_tokenizer
from queue_api.wire.schemas import GenerationRequest

ORDERS = {"as in the file": [], "--group-prefixes": ["--group-prefixes"]}
WORK = re.compile(r"engine closes after (\d+) prompt tokens, .* from the prefix cache \((\d+)\)")


@dataclass(frozen=True)
class Outcome:
    """Of one run."""

    computed: int
    """Prompt tokens, of all workers."""
    seconds: float
    cpu_s: float
    """Of all processes."""
    texts: dict[str, str]


def few_shot_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of several few-shot prompts, shuffled; the tasks are those of the demo model."""
    draw = random.Random(args.seed)
    prompts = []
    for number in range(args.prompts):
        task = TASKS[number % len(TASKS)]
        shots = [draw_question(task, draw, held_out=False) for _ in range(args.shots)]
        prompts.append((task, "".join(f"Q: {s.prompt}\nA: {s.answer}\n\n" for s in shots)))
    rows = []
    for number in range(args.rows):
        task, prefix = prompts[number % args.prompts]
        question = draw_question(task, draw, held_out=False)
        rows.append(
            {
                "prompt": f"{prefix}Q: {question.prompt}\nA:",
                "max_tokens": draw.choice(args.new_tokens),
                "ignore_eos": True,
            }
        )
    draw.shuffle(rows)
    return [{"id": f"q{number}", **row} for number, row in enumerate(rows)]


def trie_size(prompts: Iterable[Sequence[int]]) -> int:
    """Tokens in the trie: of each prompt, in order, those behind what it shares with the last."""
    size = 0
    last: Sequence[int] = ()
    for prompt in sorted(prompts):
        shared = 0
        while shared < min(len(prompt), len(last)) and prompt[shared] == last[shared]:
            shared += 1
        size += len(prompt) - shared
        last = prompt
    return size


def run(source: Path, output: Path, options: Sequence[str], num_workers: int) -> Outcome:
    """:raises SystemExit: it failed, or the workers didn't say what they computed"""
    command = module("batchmill", "run", source, "-o", output, "--workers", str(num_workers))
    began, cpu_before_s = time.perf_counter(), _cpu_of_children_s()
    done = subprocess.run(
        [*command, *options],
        env=environment(BATCHMILL_LOG_LEVEL="info"),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    took_s = time.perf_counter() - began
    work = [tuple(map(int, found)) for found in WORK.findall(done.stderr)]
    if done.returncode or len(work) != num_workers:
        sys.exit(done.stderr[-3000:])
    rows = map(json.loads, output.read_text().splitlines())
    return Outcome(
        sum(prompt - copied for prompt, copied in work),
        took_s,
        _cpu_of_children_s() - cpu_before_s,
        {row["id"]: row["text"] for row in rows},
    )


def _cpu_of_children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--prompts", type=int, default=6, help="few-shot prompts")
    parser.add_argument("--shots", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[16], help="drawn for a row")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["plain", "grouped"])
    args = parser.parse_args()
    rows = few_shot_rows(args)
    tokenizer, _ = load_tokenizer(EngineConfig(str(DEMO_MODEL_PATH)))
    prompts = [
        tokenizer.encode(GenerationRequest(id=row["id"], prompt=row["prompt"])) for row in rows
    ]
    lengths = sorted(map(len, prompts))
    trie = trie_size(prompts)
    print(
        f"{len(rows):,} rows of {args.prompts} few-shot prompts, {lengths[0]} to {lengths[-1]} "
        f"tokens each, {sum(lengths):,} in all, {trie:,} in the trie; {args.workers} workers"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = folder / "in.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs: dict[str, list[Outcome]] = {name: [] for name in ORDERS}
        for pair in range(args.pairs):
            names = [*ORDERS] if pair % 2 == 0 else [*reversed(ORDERS)]
            for name in names:
                options = ORDERS[name]
                if args.only and (args.only == "plain") == bool(options):
                    continue
                output = folder / f"out-{pair}-{len(options)}.jsonl"
                runs[name].append(run(source, output, options, args.workers))
    show(runs, trie)


def show(runs: dict[str, list[Outcome]], trie: int) -> None:
    """A line to each order, then what they are to each other."""
    for name, outcomes in runs.items():
        for outcome in outcomes:
            print(
                f"{name}: {outcome.computed:,} prompt tokens computed, "
                f"{outcome.computed / trie:.3f} x the trie's; {outcome.seconds:.1f} s, "
                f"{outcome.cpu_s:.1f} s of CPU"
            )
    plain, grouped = runs.values()
    if plain and grouped:
        for what in ("seconds", "cpu_s"):
            pairs = zip(plain, grouped, strict=True)
            ratios = [getattr(b, what) / getattr(a, what) for a, b in pairs]
            print(
                f"{what} of the grouped over those of the plain order: "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) in "
                f"{len(ratios)} pairs"
            )
        same = all(outcome.texts == plain[0].texts for outcome in [*plain, *grouped])
        print("same texts" if same else "TEXTS DIFFER")


if __name__ == "__main__":
    main()
