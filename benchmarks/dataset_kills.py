"""Kills all of a dataset run, again and again, and compares its end with an undisturbed run's.

Client, workers and the private Redis with its data die at random moments of SIGKILL; the same
command goes on. At the end the certificates of both outputs must say the same `content`, and
`batchmill verify` must find nothing.

    python -m benchmarks.dataset_kills [--rows 20000] [--kills 3] [--seed 0] [--model echo:]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from benchmarks.children import environment, module

PATIENCE_S = 600
WORDS = ("anchor", "basket", "cave", "forest", "harbor", "lion", "mirror", "orange", "river")
Command = list[str]


def rows(count: int, draw: random.Random) -> list[dict[str, Any]]:
    return [
        {"id": f"q{i}", "prompt": " ".join(draw.choices(WORDS, k=4)), "seed": i}
        for i in range(count)
    ]


def write_lines(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def batch_line(row: dict[str, Any]) -> dict[str, Any]:
    body = {"model": "m", "prompt": row["prompt"], "max_tokens": 8, "seed": row["seed"]}
    return {"custom_id": row["id"], "method": "POST", "url": "/v1/completions", "body": body}


RECIPE = """
in: {input}
out: set on the command line
model: "{model}"
workers: 2
sampling: {{max_tokens: 8}}
stages:
  - {{name: draft, template: "draft {{{{ prompt }}}}"}}
  - {{name: judge, template: "judge {{{{ draft }}}}", keep: "id[-1:] != '7'"}}
  - name: final
    template: "{{{{ draft }}}} {{{{ judge }}}}"
    sampling: {{temperature: 0.8, seed: 1}}
"""


def cases(folder: Path, args: argparse.Namespace) -> dict[str, tuple[str, Command]]:
    """By format: the output's name, and what runs towards one."""
    made = rows(args.rows, random.Random(args.seed))
    table, recipe = folder / "in.parquet", folder / "recipe.yaml"
    parquet.write_table(pyarrow.Table.from_pylist(made), table)
    lines = write_lines(folder / "in.jsonl", made)
    batch = write_lines(folder / "batch.jsonl", [batch_line(row) for row in made])
    recipe.write_text(RECIPE.format(input=lines, model=args.model))
    model = ["--model", args.model, "--workers", "2", "--max-tokens", "8"]
    return {
        "JSON Lines": ("out.jsonl", [str(lines), *model]),
        "Parquet": ("out.parquet", [str(table), *model, "--part-rows", "3000"]),
        "OpenAI batch": ("out-batch.jsonl", [str(batch), *model, "--output-format", "openai"]),
        "a recipe of 3 stages": ("out-recipe.jsonl", [str(recipe)]),
    }


def descendants(pid: int) -> list[int]:
    """A process and all that it started, in whatever group they are."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has just ended
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def kill_all(process: subprocess.Popen[bytes]) -> None:
    for pid in descendants(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def start(command: Command, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as told:
        return subprocess.Popen(command, env=environment(), stderr=told, stdout=told)


def run_to_the_end(command: Command, log: Path) -> None:
    if start(command, log).wait(PATIENCE_S) != 0:
        sys.exit(f"{' '.join(command)} failed: {log.read_text()[-2000:]}")


def content_of(output: Path) -> str:
    certificate = json.loads(output.with_name(f"{output.name}.certificate.json").read_text())
    return str(certificate["content"])


def num_bytes(output: Path) -> int:
    """Of the output and of all beside it that has its name: parts, journals, stages."""
    found = output.parent.glob(f"*{output.name}*")
    files = [file for each in found for file in ([each] if each.is_file() else each.rglob("*"))]
    total = 0
    for file in files:
        with contextlib.suppress(OSError):  # it was renamed just now
            total += file.stat().st_size
    return total


def disturbed(command: Command, log: Path, output: Path, whole_bytes: int, at: list[float]) -> int:
    """Run it, killed when so much of it is written, and at last to its end.

    :param at: the shares of the whole, ascending
    :returns: how many of the kills met it underway
    """
    met = 0
    for share in at:
        process = start(command, log)
        while process.poll() is None and num_bytes(output) < share * whole_bytes:
            time.sleep(0.002)
        if process.poll() is None:
            kill_all(process)
            met += 1
    run_to_the_end(command, log)
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="echo:")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, log = Path(scratch), Path(scratch) / "log"
        for name, (output, options) in cases(folder, args).items():

            def command(to: Path, options: Command = options) -> Command:
                return module("batchmill", "run", *options, "-o", str(to))

            whole, broken = folder / f"whole-{output}", folder / f"broken-{output}"
            run_to_the_end(command(whole), log)
            draw = random.Random(args.seed)
            at = sorted(draw.uniform(0.05, 0.95) for _ in range(args.kills))
            met = disturbed(command(broken), log, broken, num_bytes(whole), at)
            for each in (whole, broken):
                run_to_the_end(module("batchmill", "verify", str(each)), log)
            if content_of(whole) != content_of(broken):
                sys.exit(f"{name}: the outputs differ")
            print(f"{name}: {args.rows:,} rows, killed {met} times, the same content", flush=True)


if __name__ == "__main__":
    main()
