"""What is made again when a little of a large dataset changes, and how long nothing takes.

    python -m benchmarks.dataset_edits [--rows 100000] [--edits 1000]

A plain run to JSON Lines and a recipe of three stages, with the echo engine: a run, the same again,
some rows edited, and of the recipe the template of its second stage. What was asked is told by the
output's rows that are others than before.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.children import environment, module

RECIPE = """
in: in.jsonl
out: out-recipe.jsonl
model: "echo:"
workers: 2
sampling: {max_tokens: 4}
stages:
  - {name: draft, template: "draft-{{ prompt }}"}
  - {name: judge, template: "judge-{{ draft }}"}
  - {name: final, template: "final-{{ draft }}-{{ judge }}"}
"""


def write_rows(folder: Path, count: int, edited: set[int]) -> None:
    with (folder / "in.jsonl").open("w") as file:
        for row in range(count):
            what = "new" if row in edited else "old"
            file.write(json.dumps({"id": row, "prompt": f"{what}-words-of-row-{row}"}) + "\n")


def run(folder: Path, *arguments: str) -> float:
    """Seconds that the command took."""
    began = time.perf_counter()
    subprocess.run(
        module("batchmill", "run", *arguments),
        cwd=folder,
        env=environment(),
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - began


def made(path: Path) -> dict[int, dict[str, Any]]:
    """Rows by number, with who made them."""
    with path.open() as file:
        return {row["row"]: row for row in map(json.loads, file)}


def plain(folder: Path, args: argparse.Namespace, edited: set[int]) -> None:
    command = ["in.jsonl", "-o", "out.jsonl", "--model", "echo:", "--workers", "2"]
    command += ["--max-tokens", "4"]
    write_rows(folder, args.rows, set())
    first_s, again_s = run(folder, *command), run(folder, *command)
    before = made(folder / "out.jsonl")
    write_rows(folder, args.rows, edited)
    edited_s = run(folder, *command, "--redo-changed")
    after = made(folder / "out.jsonl")
    others = {row for row, columns in after.items() if columns != before[row]}
    assert len(after) == args.rows
    print(f"plain: first {first_s:.1f} s, again {again_s:.1f} s, {args.edits:,} edited: ", end="")
    print(f"{len(others):,} made again, exactly those: {others == edited}; {edited_s:.1f} s")


def recipe(folder: Path, args: argparse.Namespace, edited: set[int]) -> None:
    stages = folder / "out-recipe.jsonl.stages"

    def of_stages() -> dict[str, dict[int, dict[str, Any]]]:
        return {name: made(stages / f"{name}.jsonl") for name in ("draft", "judge", "final")}

    def told(before: dict[str, dict[int, dict[str, Any]]]) -> str:
        now = of_stages()
        others = {
            name: {row for row, columns in rows.items() if columns != before[name].get(row)}
            for name, rows in now.items()
        }
        exact = "exactly those" if all(rows in (set(), edited) for rows in others.values()) else ""
        return ", ".join(f"{name} {len(rows):,}" for name, rows in others.items()) + f" {exact}"

    write_rows(folder, args.rows, set())
    (folder / "recipe.yaml").write_text(RECIPE)
    first_s, again_s = run(folder, "recipe.yaml"), run(folder, "recipe.yaml")
    print(f"recipe: first {first_s:.1f} s, again {again_s:.1f} s")
    before = of_stages()
    write_rows(folder, args.rows, edited)
    took_s = run(folder, "recipe.yaml", "--redo-changed")
    print(f"  {args.edits:,} edited: made again {told(before)}; {took_s:.1f} s")
    before = of_stages()
    (folder / "recipe.yaml").write_text(RECIPE.replace("judge-{{ draft", "judge-this-{{ draft"))
    took_s = run(folder, "recipe.yaml", "--redo-changed")
    print(f"  another template of stage 2: made again {told(before)}; {took_s:.1f} s")
    assert len(made(folder / "out-recipe.jsonl")) == args.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--edits", type=int, default=1000)
    args = parser.parse_args()
    edited = set(random.Random(0).sample(range(args.rows), args.edits))
    with tempfile.TemporaryDirectory() as scratch:
        plain(Path(scratch), args, edited)
        recipe(Path(scratch), args, edited)


if __name__ == "__main__":
    main()
