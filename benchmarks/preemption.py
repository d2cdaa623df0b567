"""What giving slots as sequences grow is worth, beside reserving `max_tokens`: steps, sequences at
once.

How sequences would run if each reserved prompt and `max_tokens` is counted, not run: in the order
of arrival, one token of each per step, prompts computed in no time, which flatters it.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from random_llama import VOCAB_SIZES, random_llama, random_prompt
from rich.console import Console
from rich.table import Table

from engine.config import EngineConfig
from engine.engine import Engine
from queue_api.wire.schemas import GenerationRequest, SamplingParams


@dataclass(frozen=True)
class Work:
    """Texts of one length of prompt and one `max_tokens`, which end by themselves."""

    prompt_tokens: int
    max_tokens: int
    ends: list[int]
    """New tokens of each text."""

    @property
    def num_tokens(self) -> int:
        """Tokens to compute if none is computed twice; the last of each isn't."""
        return sum(self.prompt_tokens + end - 1 for end in self.ends)


@dataclass(frozen=True)
class Run:
    running: list[int]
    """Texts that ran at once, by step."""
    num_computed: int

    def mean_running(self) -> float:
        return sum(self.running) / len(self.running)


def run_engine(engine: Engine, work: Work, vocab_size: int) -> Run:
    """Texts are cancelled where they end: a random model has no end of its own."""
    sampling = SamplingParams(max_tokens=work.max_tokens, ignore_eos=True)
    for i in range(len(work.ends)):
        prompt = random_prompt(work.prompt_tokens, i, vocab_size)
        engine.add(f"{i}", GenerationRequest(id=f"{i}", prompt=prompt, sampling=sampling))
    running = []
    while engine.has_unfinished():
        engine.step()
        running.append(engine.num_running)
        for key, tokens in engine.progress().items():
            if len(tokens) >= work.ends[int(key)]:
                engine.cancel(key)
    return Run(running, engine.metrics.computed_tokens)


def count_reserved(work: Work, num_slots: int, max_num_seqs: int) -> Run:
    size = work.prompt_tokens + work.max_tokens
    num_places = min(max_num_seqs, num_slots // size)
    waiting = deque(work.ends)
    left: list[int] = []
    running = []
    while waiting or left:
        while waiting and len(left) < num_places:
            left.append(waiting.popleft())
        running.append(len(left))
        left = [tokens - 1 for tokens in left if tokens > 1]
    return Run(running, work.num_tokens)


def lengths(kind: str, count: int, max_tokens: int) -> list[int]:
    """New tokens of each text, from a fixed seed."""
    generator = random.Random(0)
    if kind == "full":
        return [max_tokens] * count
    if kind == "even":
        return [generator.randint(1, max_tokens) for _ in range(count)]
    return [min(max_tokens, 1 + int(generator.expovariate(8 / max_tokens))) for _ in range(count)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--slots", type=int, default=2048)
    parser.add_argument("--places", type=int, default=64, help="texts that may run at once")
    args = parser.parse_args(argv)
    table = Table(
        title=f"M1, {args.texts} texts of {args.prompt_tokens} prompt tokens, max_tokens "
        f"{args.max_tokens}, {args.slots} slots, {args.places} places"
    )
    for column in ("texts end", "way", "steps", "running", "computed", "preempted", "moved"):
        table.add_column(column, justify="right")
    with random_llama("M1") as folder:
        for kind in ("early", "even", "full"):
            ends = lengths(kind, args.texts, args.max_tokens)
            work = Work(args.prompt_tokens, args.max_tokens, ends)
            engine = Engine.load(
                EngineConfig(
                    str(folder),
                    max_num_seqs=args.places,
                    kv_cache_tokens=args.slots,
                    num_threads=1,
                )
            )
            reserved = count_reserved(work, args.slots, args.places)
            grown = run_engine(engine, work, VOCAB_SIZES["M1"])
            metrics = engine.metrics
            engine.close()
            rows = (
                ("reserved", reserved, "", ""),
                ("as it grows", grown, f"{metrics.preemptions:,}", f"{metrics.moved_tokens:,}"),
            )
            for way, run, preempted, moved in rows:
                computed = f"{run.num_computed / work.num_tokens:.2f} x"
                steps, mean = f"{len(run.running):,}", f"{run.mean_running():.1f}"
                table.add_row(kind, way, steps, mean, computed, preempted, moved)
    Console().print(table)


if __name__ == "__main__":
    main()
