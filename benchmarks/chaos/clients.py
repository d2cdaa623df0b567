"""The clients that get killed: `python -m benchmarks.chaos.clients KIND ROWS.jsonl OUTPUT`.

Each does the same again when it is started again, as a user's program would. Every result it is
told is one line of its output, written when it is told.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TextIO

from batchmill import Client, GenerationResult
from benchmarks.chaos.workload import ECHO_QUEUE, Part

__all__ = ["read_told"]

CALLS_AT_ONCE = 8


def read_told(path: Path) -> list[tuple[str, GenerationResult]]:
    """(run, result) in the order they were told. A torn last line, of a kill, is left out."""
    if not path.exists():
        return []
    lines = [line for line in path.read_bytes().split(b"\n") if line]
    told = []
    for line in lines:
        try:
            run, result = json.loads(line)
        except ValueError:
            continue
        told.append((run, GenerationResult.model_validate(result)))
    return told


def tell(output: TextIO, run: str, result: GenerationResult) -> None:
    # a line torn by a kill ends here
    output.write(f"\n[{json.dumps(run)},{result.model_dump_json(exclude_defaults=True)}]\n")
    output.flush()


async def call(part: Part, path: Path) -> None:
    """Ask for each row by `generate` with its id; what was told before isn't asked again."""
    told = {run for run, _ in read_told(path)}
    left = iter([(run, row) for run, (row,) in part.runs() if run not in told])
    with path.open("a", encoding="utf-8") as output:
        async with Client(queue=part.queue) as client:

            async def ask() -> None:
                for run, row in left:
                    result = await client.generate(**row)
                    tell(output, run, result)

            async with asyncio.TaskGroup() as tasks:
                for _ in range(CALLS_AT_ONCE):
                    tasks.create_task(ask())


async def submit(part: Part, path: Path) -> None:
    """Submit run after run and read each to its end; all of them again after a kill."""
    with path.open("a", encoding="utf-8") as output:
        async with Client(queue=part.queue) as client:
            for run_id, rows in part.runs():
                run = await client.submit(rows, run_id)
                async for result in run.results():
                    tell(output, run_id, result)


def main() -> None:
    kind, rows, output = sys.argv[1:]
    path = Path(rows)
    loaded = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    work = {"calls": call, "waves": submit}[kind]
    part = Part(path.stem, kind, ECHO_QUEUE, loaded)  # type: ignore[arg-type]
    asyncio.run(work(part, Path(output)))


if __name__ == "__main__":
    main()
