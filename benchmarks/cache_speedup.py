"""What the cache saves: the same 50 new tokens with it and without, whole and per step."""

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


def timed_steps(folder: Path, prompt: list[int], new: int, *, use_cache: bool) -> tuple:
    """Token ids, and the seconds of each step; the first is the prompt's."""
    engine = Engine.load(EngineConfig(str(folder), use_cache=use_cache, max_num_seqs=1))
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    request = GenerationRequest(id="r", prompt=prompt, sampling=params)
    engine.generate([request.model_copy(update={"sampling": SamplingParams(max_tokens=2)})])
    engine.add("r", request)
    steps, done = [], []
    while not done:
        started = time.perf_counter()
        done = engine.step()
        steps.append(time.perf_counter() - started)
    engine.close()
    return done[0].token_ids, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["M1", "M2"], default="M1")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=50)
    args = parser.parse_args()
    prompt = random_prompt(args.prompt_tokens, 0, VOCAB_SIZES[args.model])
    with random_llama(args.model) as folder:
        tokens_with, with_cache = timed_steps(folder, prompt, args.new_tokens, use_cache=True)
        tokens_without, without = timed_steps(folder, prompt, args.new_tokens, use_cache=False)
    table = Table(title=f"{args.model}, {args.prompt_tokens} + {args.new_tokens} tokens, 1 text")
    for column in ("", "with cache", "without", "without / with"):
        table.add_column(column, justify="right")
    rows = {
        "whole (s)": (sum(with_cache), sum(without), 3),
        "prompt (ms)": (1e3 * with_cache[0], 1e3 * without[0], 1),
        "median step after it (ms)": (
            1e3 * statistics.median(with_cache[1:]),
            1e3 * statistics.median(without[1:]),
            1,
        ),
        "last 10 steps (ms each)": (
            1e2 * sum(with_cache[-10:]),
            1e2 * sum(without[-10:]),
            1,
        ),
    }
    for name, (a, b, digits) in rows.items():
        table.add_row(name, f"{a:.{digits}f}", f"{b:.{digits}f}", f"{b / a:.1f} x")
    Console().print(table)
    print("same tokens" if tokens_with == tokens_without else "TOKENS DIFFER")


if __name__ == "__main__":
    main()
