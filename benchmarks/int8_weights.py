"""What int8 weights save: tokens per second and memory with them and without."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from random_llama import VOCAB_SIZES, random_llama, random_prompt
from rich.console import Console
from rich.table import Table

from engine.config import EngineConfig
from engine.engine import Engine
from engine.kernels.malloc import give_back_freed_memory
from engine.planning.memory import anonymous_bytes
from queue_api.wire.schemas import GenerationRequest, SamplingParams

KINDS = ("none", "int8")


def measure(folder: Path, kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second by texts at a time; `load_s`, and `held`, the bytes once it is loaded."""
    before = anonymous_bytes()
    started = time.perf_counter()
    engine = Engine.load(
        EngineConfig(
            str(folder),
            quantization=kind,  # type: ignore[arg-type]
            num_threads=args.threads,
            max_num_seqs=max(args.texts),
        )
    )
    found: dict[str, float] = {"load_s": time.perf_counter() - started}
    give_back_freed_memory()
    found["held"] = anonymous_bytes() - before
    params = SamplingParams(max_tokens=args.new_tokens, ignore_eos=True)
    for count in args.texts:
        requests = [
            GenerationRequest(
                id=str(i), prompt=random_prompt(8, i, VOCAB_SIZES[args.model]), sampling=params
            )
            for i in range(count)
        ]
        speeds = []
        for _ in range(args.runs + 1):  # the first one warms up
            started = time.perf_counter()
            engine.generate(requests)
            speeds.append(count * args.new_tokens / (time.perf_counter() - started))
            engine.reset_prefix_cache()
        found[str(count)] = max(speeds[1:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["M1", "M2"], default="M1")
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(Path(args.only[1]), args.only[0], args)))
        return
    with random_llama(args.model) as folder:
        found = {}
        for kind in KINDS:
            command = [sys.executable, *sys.argv, "--only", kind, str(folder)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[kind] = json.loads(answer.stdout.splitlines()[-1])
    show(args, found)


def show(args: argparse.Namespace, found: dict[str, dict[str, float]]) -> None:
    """A row to each kind of weights."""
    table = Table(title=f"{args.model}, {args.threads} threads, {args.new_tokens} new tokens each")
    for column in ("weights", *(f"{n} texts, tok/s" for n in args.texts), "loaded in s", "MB held"):
        table.add_column(column, justify="right")
    for kind, numbers in found.items():
        speeds = (f"{numbers[str(count)]:.0f}" for count in args.texts)
        name = "float32" if kind == "none" else kind
        table.add_row(name, *speeds, f"{numbers['load_s']:.1f}", f"{numbers['held'] / 1e6:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
