"""`run_dataset` over rows that are Python's: mappings and tables, which are given back."""

from __future__ import annotations

import asyncio
import datetime
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas
import polars
import pyarrow
import pytest
import redis
from kits.client_kit import Answerer

from batchmill import Client, Layout, RowSelection, RunSummary, run_dataset
from queue_api.connection.settings import QueueSettings
from queue_api.wire.errors import ConfigurationError, DatasetError, MissingExtraError

NUM_ROWS = 300
ROWS = [{"id": i, "prompt": f"p{i}", "level": i % 3} for i in range(NUM_ROWS)]

Run = Callable[..., RunSummary]


@pytest.fixture
def run(settings: QueueSettings, connection: redis.Redis) -> Run:
    def run(make: Callable[[], Any], *args: Any, **kwargs: Any) -> RunSummary:
        async def main() -> RunSummary:
            async with Client(settings=settings) as client, Answerer(connection).answering():
                return await run_dataset(client, make(), *args, chunk_size=8, **kwargs)

        return asyncio.run(main())

    return run


def generated() -> Iterator[dict[str, Any]]:
    yield from ROWS


async def awaited() -> AsyncIterator[dict[str, Any]]:
    for row in ROWS:
        await asyncio.sleep(0)
        yield row


TABLES: dict[str, tuple[Callable[[], Any], type, Callable[[Any], list[dict[str, Any]]]]] = {
    "list": (lambda: ROWS, list, list),
    "generator": (generated, list, list),
    "async generator": (awaited, list, list),
    "pandas": (
        lambda: pandas.DataFrame(ROWS),
        pandas.DataFrame,
        lambda table: table.to_dict("records"),
    ),
    "polars": (lambda: polars.DataFrame(ROWS), polars.DataFrame, lambda table: table.to_dicts()),
    "lazy polars": (
        lambda: polars.LazyFrame(ROWS),
        polars.DataFrame,
        lambda table: table.to_dicts(),
    ),
    "arrow": (
        lambda: pyarrow.Table.from_pylist(ROWS),
        pyarrow.Table,
        lambda table: table.to_pylist(),
    ),
    "datasets": (lambda: datasets.Dataset.from_list(ROWS), datasets.Dataset, list),
}


@pytest.mark.parametrize("kind", TABLES)
def test_rows_come_back_as_the_like_in_order(run: Run, kind: str) -> None:
    make, is_like, rows_of = TABLES[kind]
    summary = run(make)
    assert isinstance(summary.output, is_like)
    found = rows_of(summary.output)
    assert [(row["id"], row["level"]) for row in found] == [(i, i % 3) for i in range(NUM_ROWS)]
    assert [row["text"] for row in found] == [f"answer to p{i}" for i in range(NUM_ROWS)]
    assert summary.rows == NUM_ROWS and summary.errors == 0


def test_rows_may_go_to_a_file_and_on_from_there(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert run(lambda: ROWS, output).rows == NUM_ROWS
    again = run(lambda: pandas.DataFrame(ROWS), output)
    assert (again.rows, again.resumed, again.output) == (0, NUM_ROWS, None)
    others = [{**row, "prompt": "other"} for row in ROWS]
    with pytest.raises(DatasetError, match="has 'p0' as 'prompt', the input's has 'other'"):
        run(lambda: others, output)


def test_an_odd_row_costs_itself_alone(run: Run) -> None:
    odd = [
        {"prompt": "a", "when": datetime.date(2026, 1, 1)},
        "no mapping",
        {"prompt": "b", "x": float("nan")},
        {"prompt": "c"},
    ]
    found = run(lambda: odd).output
    assert [row["text"] for row in found] == ["", "", "", "answer to c"]
    told = [row["error"] for row in found]
    assert "row 1: column 'when' can't be written as JSON" in told[0] and found[0]["prompt"] == "a"
    assert "row 2: not a mapping but str" in told[1]
    assert "row 3: not JSON: NaN in column 'x'" in told[2]


def test_two_lists_are_two_runs(run: Run) -> None:
    assert run(lambda: ROWS[:3]).run != run(lambda: ROWS[:3]).run
    for wrong in (lambda: 3, lambda: {"prompt": "a"}, lambda: b"bytes"):
        with pytest.raises(DatasetError, match="no rows in"):
            run(wrong)
    with pytest.raises(DatasetError, match="Its columns are 'question'"):
        run(lambda: [{"question": "a"}])
    found = run(lambda: [{"question": "a"}], layout=Layout(prompt_column="question")).output
    assert found[0]["text"] == "answer to a"
    with pytest.raises(ConfigurationError, match="'format' is of files"):
        run(lambda: ROWS, format="csv")


def test_no_more_is_taken_from_a_generator_than_is_asked_for(run: Run) -> None:
    taken, most = 0, 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for row in ROWS * 10:
            taken += 1
            yield {**row, "id": str(taken)}

    def look(progress: Any) -> None:
        nonlocal most
        most = max(most, taken - progress.done)

    assert run(counted, window=16, on_progress=look).rows == NUM_ROWS * 10
    assert 0 < most < NUM_ROWS * 10 // 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("selection", [None, RowSelection(limit=5)])
@pytest.mark.parametrize("is_awaited", [True, False])
def test_a_generator_that_gives_nothing_more_keeps_nobody(
    settings: QueueSettings,
    connection: redis.Redis,
    is_awaited: bool,
    selection: RowSelection | None,
) -> None:
    reached, never = threading.Event(), threading.Event()

    async def endless() -> AsyncIterator[dict[str, Any]]:
        yield {"prompt": "a"}
        reached.set()
        await asyncio.Event().wait()

    def blocked() -> Iterator[dict[str, Any]]:
        yield {"prompt": "a"}
        reached.set()
        never.wait()

    async def main() -> None:
        async with Client(settings=settings) as client, Answerer(connection).answering():
            rows = endless() if is_awaited else blocked()
            work = asyncio.create_task(run_dataset(client, rows, selection=selection))
            await asyncio.to_thread(reached.wait)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work

    asyncio.run(main())
    never.set()


def test_what_goes_wrong_in_a_generator_is_raised(run: Run) -> None:
    def breaks() -> Iterator[dict[str, Any]]:
        yield {"prompt": "a"}
        raise RuntimeError("of mine")

    async def breaks_too() -> AsyncIterator[dict[str, Any]]:
        yield {"prompt": "a"}
        raise RuntimeError("of mine")

    for rows in (breaks, breaks_too):
        with pytest.raises(RuntimeError, match="of mine"):
            run(rows)


def test_a_table_without_pyarrow_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'batchmill\[files\]'"):
        run(lambda: pandas.DataFrame(ROWS))
