"""What a shared prefix saves: the same requests with prefix caching and without, in turns."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from random_llama import VOCAB_SIZES, random_llama, random_prompt
from rich.console import Console
from rich.table import Table

from engine.config import EngineConfig
from engine.engine import Engine
from queue_api.wire.schemas import GenerationRequest, SamplingParams


def load(folder: Path, *, prefix_caching: bool) -> Engine:
    return Engine.load(EngineConfig(str(folder), num_threads=1, prefix_caching=prefix_caching))


def timed(engine: Engine, requests: list[GenerationRequest]) -> tuple[list[list[int]], float, int]:
    """Token ids, CPU seconds and tokens computed, from an empty prefix cache on."""
    engine.reset_prefix_cache()
    before = engine.metrics.computed_tokens
    started = time.process_time()
    done = engine.generate(requests)
    seconds = time.process_time() - started
    return [c.token_ids for c in done], seconds, engine.metrics.computed_tokens - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["M1", "M2"], default="M1")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--shared-tokens", type=int, default=200)
    parser.add_argument("--own-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    vocabulary = VOCAB_SIZES[args.model]
    prefix = random_prompt(args.shared_tokens, 0, vocabulary)
    params = SamplingParams(max_tokens=args.new_tokens, ignore_eos=True)
    requests = [
        GenerationRequest(
            id=str(i),
            prompt=prefix + random_prompt(args.own_tokens, i + 1, vocabulary),
            sampling=params,
        )
        for i in range(args.requests)
    ]
    with random_llama(args.model) as folder:
        engines = {shares: load(folder, prefix_caching=shares) for shares in (False, True)}
        runs = [
            {shares: timed(engine, requests) for shares, engine in engines.items()}
            for _ in range(args.runs)
        ]
    show(args, runs, engines[True].metrics.prefix_hit_rate)


def show(args: argparse.Namespace, runs: list, hit_rate: float) -> None:
    """A table of both ways, then the ratios."""
    table = Table(
        title=f"{args.model}, {args.requests} requests of {args.shared_tokens} shared + "
        f"{args.own_tokens} own + {args.new_tokens} new tokens, 1 thread, {args.runs} runs"
    )
    for column in ("prefix caching", "tokens computed", "CPU s (median)"):
        table.add_column(column, justify="right")
    computed = {shares: runs[0][shares][2] for shares in (False, True)}
    for shares, name in ((False, "off"), (True, "on")):
        seconds = statistics.median(run[shares][1] for run in runs)
        table.add_row(name, f"{computed[shares]:,}", f"{seconds:.2f}")
    Console().print(table)
    saved = (computed[False] - computed[True]) / (args.shared_tokens * args.requests)
    faster = statistics.median(run[False][1] / run[True][1] for run in runs)
    print(f"shared part not computed: {saved:.1%}; hit rate {hit_rate:.1%}; {faster:.2f} x as fast")
    same = all(run[True][0] == run[False][0] for run in runs)
    print("same tokens" if same else "TOKENS DIFFER")


if __name__ == "__main__":
    main()
