"""Files as people have them: what comes of each, and that none ends in silent garbage."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from kits.client_kit import Answerer

from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.run import run_dataset
from queue_api.datasets.summary import RunSummary
from queue_api.wire.errors import DatasetError

Run = Callable[..., RunSummary]


@pytest.fixture
def run(settings: QueueSettings, connection: redis.Redis) -> Run:
    def run(*args: Any, **kwargs: Any) -> RunSummary:
        async def main() -> RunSummary:
            async with Client(settings=settings) as client, Answerer(connection).answering():
                return await run_dataset(client, *args, **kwargs)

        return asyncio.run(main())

    return run


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: int(row["row"]))


def test_what_is_damaged_costs_none_of_the_rows_before_it(run: Run, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": f"p{i}"}).encode() + b"\n" for i in range(300)]
    packed = gzip.compress(b"".join(lines[:200])) + gzip.compress(b"".join(lines[200:]))
    source.write_bytes(packed[:-10])
    with pytest.raises(DatasetError, match="is gzip that was cut off"):
        run(source, output)
    found = rows_of(output)
    assert len(found) >= 200
    assert [row["text"] for row in found] == [f"answer to p{i}" for i in range(len(found))]
    source.write_bytes(packed)
    summary = run(source, output)
    assert (summary.resumed, summary.rows) == (len(found), 300 - len(found))
    assert [row["prompt"] for row in rows_of(output)] == [f"p{i}" for i in range(300)]
