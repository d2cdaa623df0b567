"""Runs into every format: broken off anywhere they go on, and what was wrong is asked for again."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from kits.client_kit import Answerer
from kits.sink_kit import KINDS, Kind

from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.formats.output_options import OutputOptions
from queue_api.datasets.run import run_dataset
from queue_api.datasets.summary import RunSummary
from queue_api.datasets.verify import verify_output
from queue_api.wire.errors import DatasetError

ROWS = 300
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
Run = Callable[..., RunSummary]


def options_of(kind: Kind, folder: Path) -> OutputOptions:
    errors = kind.options.errors and str(folder / kind.options.errors)
    return OutputOptions(
        kind.options.format, kind.options.part_rows, errors, kind.options.errors_only_apart
    )


@pytest.fixture
def run(settings: QueueSettings, connection: redis.Redis, tmp_path: Path) -> Run:
    def run(kind: Kind, **options: Any) -> RunSummary:
        async def main() -> RunSummary:
            async with Client(settings=settings) as client, Answerer(connection).answering():
                return await run_dataset(
                    client,
                    tmp_path / "in.jsonl",
                    kind.path(tmp_path),
                    outputs=options_of(kind, tmp_path),
                    **options,
                )

        return asyncio.run(main())

    return run


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _run_alone(settings: QueueSettings, number: int, folder: Path) -> None:
    kind = KINDS[number]

    async def main() -> None:
        async with Client(settings=settings) as client:
            await run_dataset(
                client,
                folder / "in.jsonl",
                kind.path(folder),
                outputs=options_of(kind, folder),
                chunk_size=8,
                window=64,
            )

    asyncio.run(main())
    os._exit(0)


@every_kind
def test_a_run_killed_again_and_again_ends_with_each_row_once(
    kind: Kind, run: Run, settings: QueueSettings, connection: redis.Redis, tmp_path: Path
) -> None:
    write(tmp_path, [{"prompt": "" if i % 50 == 9 else f"p{i}", "k": i} for i in range(ROWS)])
    draw = random.Random(str(kind))

    async def killed() -> None:
        fork = multiprocessing.get_context("spawn")
        child = fork.Process(target=_run_alone, args=(settings, KINDS.index(kind), tmp_path))
        async with Answerer(connection).answering():
            child.start()
            # from when the output is there: starting Python takes longer than writing the rows
            while child.is_alive() and not kind.path(tmp_path).exists():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            await asyncio.to_thread(child.join, draw.uniform(0, 0.4))
            if child.is_alive():
                os.kill(child.pid or 0, signal.SIGKILL)
            child.join()

    for _ in range(3):
        asyncio.run(killed())
    connection.flushall()
    summary = run(kind)
    assert summary.rows + summary.resumed == ROWS
    assert summary.errors + summary.errors_before == ROWS // 50
    assert kind.rows(tmp_path) == list(range(ROWS))
    verdict = verify_output(kind.path(tmp_path))
    assert (verdict.rows, verdict.problems, verdict.notes) == (ROWS, [], [])


@every_kind
def test_errors_are_asked_for_again_and_changes_are_told(
    kind: Kind, run: Run, tmp_path: Path
) -> None:
    rows = [{"prompt": "" if i in (3, 8) else f"p{i}", "k": i} for i in range(20)]
    write(tmp_path, rows)
    assert run(kind).errors == 2
    again = run(kind)
    assert (again.rows, again.errors_before) == (0, 2)
    again = run(kind, retry_errors=True)
    assert (again.rows, again.errors) == (2, 2)
    write(tmp_path, [{**row, "prompt": row["prompt"] or "put right"} for row in rows])
    again = run(kind)
    assert (again.rows, again.errors, again.errors_before) == (2, 0, 0)
    write(tmp_path, [{**row, "prompt": "else"} for row in rows])
    with pytest.raises(DatasetError, match="belongs to another input"):
        run(kind)
    assert run(kind, redo_changed=True).rows == 20
    assert kind.rows(tmp_path) == list(range(20))
    verdict = verify_output(kind.path(tmp_path))
    assert (verdict.problems, verdict.notes) == ([], [])
