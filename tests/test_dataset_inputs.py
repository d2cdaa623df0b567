"""Files as people have them: what comes of each, and that none ends in silent garbage."""

from __future__ import annotations

import asyncio
import gzip
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from kits.client_kit import Answerer
from kits.house import ROOT
from kits.input_files import FILES, InputFile

from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.layout.layout import Layout
from queue_api.datasets.run import run_dataset
from queue_api.datasets.summary import RunSummary
from queue_api.wire.errors import DatasetError
from queue_api.wire.schemas import GenerationRequest

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


@pytest.mark.parametrize("ordered", [False, True])
def test_what_is_damaged_costs_none_of_the_rows_before_it(
    run: Run, tmp_path: Path, ordered: bool
) -> None:
    source, output = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": f"p{i}"}).encode() + b"\n" for i in range(300)]
    packed = gzip.compress(b"".join(lines[:200])) + gzip.compress(b"".join(lines[200:]))
    source.write_bytes(packed[:-10])
    with pytest.raises(DatasetError, match="is gzip that was cut off"):
        run(source, output, ordered=ordered)
    found = rows_of(output)
    assert len(found) >= 200
    assert [row["text"] for row in found] == [f"answer to p{i}" for i in range(len(found))]
    source.write_bytes(packed)
    summary = run(source, output, ordered=ordered)
    assert (summary.resumed, summary.rows) == (len(found), 300 - len(found))
    assert [row["prompt"] for row in rows_of(output)] == [f"p{i}" for i in range(300)]


class Asked(Answerer):
    """Answers with what was asked."""

    def text_of(self, request: GenerationRequest) -> str:
        if request.messages is not None:
            return f"asked: {request.messages[-1].content}"
        return f"asked: {request.prompt}"


@pytest.mark.parametrize("file", FILES, ids=[f"{file.name}: {file.about}" for file in FILES])
def test_every_row_is_asked_once_or_said_to_be_wrong(
    settings: QueueSettings, connection: redis.Redis, tmp_path: Path, file: InputFile
) -> None:
    output = tmp_path / "out" / "out.jsonl"
    output.parent.mkdir()
    file.write(tmp_path)

    async def main() -> RunSummary:
        answering = Asked(connection).answering()
        async with Client(settings=settings) as client, answering:
            return await run_dataset(
                client,
                tmp_path / file.name,
                output,
                format=file.format or None,
                layout=Layout(**file.layout),
                warn=lambda _: None,
            )

    told = ""
    try:
        summary = asyncio.run(main())
        assert summary.rows == len(file.asked)
        assert summary.errors == file.asked.count(None)
    except DatasetError as error:
        told = str(error)
    assert bool(told) == file.refused, told
    rows = rows_of(output) if output.exists() else []
    assert [row["row"] for row in rows] == list(range(len(file.asked)))
    expected = ["" if text is None else f"asked: {text}" for text in file.asked]
    assert [row["text"] for row in rows] == expected
    assert [row["text"] for row in rows if row["error"]] == [""] * file.asked.count(None)
    words = told or next((row["error"] for row in rows if row["error"]), "")
    assert file.told in words
    assert "\n" not in words
    assert bool(words) == bool(file.told)


def test_there_are_thirty_files_and_the_page_is_of_them() -> None:
    assert len(FILES) >= 30
    page = runpy.run_path(str(ROOT / "docs/list_inputs.py"))["page"]()
    assert (ROOT / "docs/inputs.md").read_text(encoding="utf-8") == page, "run `make inputs`"
