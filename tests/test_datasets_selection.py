"""Some of the rows: drawn, shuffled, limited, the same ones again after any crash."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import redis
from kits.client_kit import Answerer

from batchmill import RowSelection
from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.chosen_source import ChosenSource
from queue_api.datasets.formats.opening import open_source
from queue_api.datasets.run import run_dataset
from queue_api.datasets.summary import Progress, RunSummary
from queue_api.wire.errors import ConfigurationError, DatasetError
from queue_api.wire.schemas import SamplingParams

NUM_ROWS = 200


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    # blank lines don't count, and some rows have ids of their own
    lines = [json.dumps({"prompt": f"p{i}"} | ({"id": f"own {i}"} if i % 2 else {})) for i in ROWS]
    path.write_text("\n\n".join(lines) + "\n")
    return path


ROWS = range(NUM_ROWS)


def chosen(path: Path, **options: Any) -> list[int | None]:
    """The numbers of the rows that are read, in order; each has to be that row."""
    with contextlib.closing(ChosenSource(open_source(path), RowSelection(**options))) as rows:
        records = list(rows.records())
        assert rows.count() == len(records)
        assert [record.read["prompt"] for record in records] == [f"p{r.row}" for r in records]
        assert [record.number for record in records] == [2 * (r.row or 0) + 1 for r in records]
        return [record.row for record in records]


def test_a_limit_takes_the_first_rows(source: Path) -> None:
    assert chosen(source, limit=3) == [0, 1, 2]
    assert chosen(source, limit=10**15) == [*ROWS]


def test_a_sample_is_in_order_and_a_larger_one_holds_the_smaller(source: Path) -> None:
    ten, twenty = chosen(source, sample=10), chosen(source, sample=20)
    assert len(ten) == 10
    assert ten == sorted(ten)
    assert {*ten} < {*twenty}
    assert chosen(source, sample=10, seed=1) not in (ten, chosen(source, sample=10, seed=2))
    assert chosen(source, sample=1000) == [*ROWS]
    few, more = chosen(source, sample_percent=10), chosen(source, sample_percent=30.5)
    assert {*few} < {*more}
    assert chosen(source, sample_percent=100) == [*ROWS]
    assert chosen(source, sample=10, limit=4) == ten[:4]


def test_each_row_is_drawn_as_often_as_any() -> None:
    for selection in ({"sample": 100}, {"sample_percent": 10}):
        counts = [0] * 1000
        for seed in range(300):
            for number in RowSelection(seed=seed, **selection).numbers(1000):
                counts[number] += 1
        # 300 draws of a tenth: 30 each, with a deviation of 5.2; none of 1,000 is further than 6 of
        # those, and their squares add up as those of independent draws do (variance 27 each)
        assert all(0 < count < 62 for count in counts)
        assert 22 < sum((count - 30) ** 2 for count in counts) / 1000 < 33


def test_a_shuffle_has_every_row_in_another_order(source: Path) -> None:
    first = chosen(source, shuffle=True)
    assert first != [*ROWS]
    assert sorted(first) == [*ROWS]
    assert first == chosen(source, shuffle=True)
    assert first != chosen(source, shuffle=True, seed=1)
    assert chosen(source, shuffle=True, limit=5) == first[:5]
    sample = chosen(source, shuffle=True, sample=9)
    assert sorted(sample) == chosen(source, sample=9)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"limit": 0}, "the limit is 0: must be at least 1"),
        ({"sample": 0}, "the sample is 0"),
        ({"sample_percent": 0.0}, "the sample is 0%"),
        ({"sample_percent": 101.0}, "the sample is 101%"),
        ({"sample_percent": float("nan")}, "the sample is nan%"),
        ({"sample": 1, "sample_percent": 1.0}, "not both"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        RowSelection(**options)


def pipe(content: bytes) -> int:
    """A file descriptor to read that from, once; it stays open for writing until it is read."""
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    return reading


def test_a_pipe_can_be_limited_and_sampled_by_a_percentage_alone(source: Path) -> None:
    def of_pipe(**options: Any) -> list[int | None]:
        reading = pipe(source.read_bytes())
        try:
            whole = open_source(f"/dev/fd/{reading}")
            with contextlib.closing(ChosenSource(whole, RowSelection(**options))) as rows:
                return [record.row for record in rows.records()]
        finally:
            os.close(reading)

    assert of_pipe(limit=3) == [0, 1, 2]
    assert of_pipe(sample_percent=10) == chosen(source, sample_percent=10)
    for options in ({"sample": 3}, {"shuffle": True}):
        with pytest.raises(DatasetError, match=r"can be read only once.*sample a percentage"):
            of_pipe(**options)


def test_rows_behind_a_limit_are_not_waited_for() -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, b'{"prompt": "a"}\n{"prompt": "b"}\n')
        whole = open_source(f"/dev/fd/{reading}")
        with contextlib.closing(ChosenSource(whole, RowSelection(limit=2))) as rows:
            assert [record.row for record in rows.records()] == [0, 1]
    finally:
        os.close(writing)
        os.close(reading)


async def answered(
    settings: QueueSettings, answerer: Answerer, *files: Path, **options: Any
) -> RunSummary:
    async with Client(settings=settings) as client, answerer.answering():
        return await run_dataset(client, *files, chunk_size=8, window=64, **options)


def rows_of(path: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_number = {row["row"]: row for row in rows}
    assert len(by_number) == len(rows), "a row is there twice"
    for number, row in by_number.items():
        assert row["prompt"] == f"p{number}"
        assert row["text"] == f"answer to p{number}"
        assert row["id"] == (f"own {number}" if number % 2 else str(number))
    return by_number


SELECTIONS = [
    {"limit": 70},
    {"sample": 70},
    {"sample_percent": 35.0},
    {"shuffle": True},
    {"sample": 90, "shuffle": True, "limit": 70},
]


@pytest.mark.parametrize("options", SELECTIONS)
def test_rows_keep_their_numbers_and_a_larger_selection_adds(
    settings: QueueSettings, answerer: Answerer, source: Path, options: dict[str, Any]
) -> None:
    output = source.with_name("out.jsonl")
    told: list[Progress] = []

    def run(**options: Any) -> RunSummary:
        selection = RowSelection(**options)
        files = (source, output)
        return asyncio.run(
            answered(settings, answerer, *files, selection=selection, on_progress=told.append)
        )

    wanted = {*chosen(source, **options)}
    assert run(**options).rows == len(wanted)
    first = rows_of(output)
    assert {*first} == wanted
    assert told[-1].done == told[-1].total == len(wanted)
    again = run(**options)
    assert (again.rows, again.resumed) == (0, len(wanted))
    # another selection adds what is missing, all of the rows the rest
    other = {*chosen(source, sample=50, seed=9)}
    added = run(sample=50, seed=9)
    assert (added.rows, added.resumed) == (len(other - wanted), len(other & wanted))
    assert told[-1].done == told[-1].total == len(other)
    assert {*rows_of(output)} == wanted | other
    assert run().rows == NUM_ROWS - len(wanted | other)
    assert {*rows_of(output)} == {*ROWS}
    assert {n: rows_of(output)[n] for n in first} == first


@pytest.mark.parametrize("options", SELECTIONS)
@pytest.mark.parametrize("seed", [1, 2])
def test_broken_off_anywhere_the_same_rows_are_there_once(
    settings: QueueSettings,
    connection: redis.Redis,
    answerer: Answerer,
    source: Path,
    options: dict[str, Any],
    seed: int,
) -> None:
    output = source.with_name("out.jsonl")
    draw = random.Random(seed)
    selection = RowSelection(**options)

    async def some_time() -> None:
        """End after so many rows."""
        enough = draw.randrange(1, 40)

        def stop(progress: Progress) -> None:
            if progress.done >= enough:
                work.cancel()

        files = (source, output)
        work = asyncio.create_task(
            answered(settings, answerer, *files, selection=selection, on_progress=stop)
        )
        with contextlib.suppress(asyncio.CancelledError):
            await work

    for _ in range(4):
        asyncio.run(some_time())
        if draw.random() < 0.5:
            connection.flushall()
        if output.exists() and draw.random() < 0.5:
            # rows that were answered and didn't get to the file
            output.write_bytes(output.read_bytes()[: -draw.randrange(1, 400)])
    asyncio.run(answered(settings, answerer, source, output, selection=selection))
    assert {*rows_of(output)} == {*chosen(source, **options)}


def test_rows_that_changed_and_are_not_chosen_are_refused_by_name(
    settings: QueueSettings, answerer: Answerer, source: Path
) -> None:
    output = source.with_name("out.jsonl")

    def run(**options: Any) -> RunSummary:
        return asyncio.run(answered(settings, answerer, source, output, **options))

    run(selection=RowSelection(limit=20))
    other = {"defaults": SamplingParams(max_tokens=3)}
    with pytest.raises(DatasetError, match="its row 0 was made with other options"):
        run(selection=RowSelection(limit=10), **other)
    with pytest.raises(DatasetError, match="row 10 of the output belongs to another input or"):
        run(selection=RowSelection(limit=10), redo_changed=True, **other)
    before = rows_of(output)
    assert len(before) == 20
    assert run(selection=RowSelection(limit=30), redo_changed=True, **other).rows == 30
    assert all(rows_of(output)[n]["fingerprint"] != before[n]["fingerprint"] for n in before)


def test_chosen_rows_come_in_order_if_asked_for(
    settings: QueueSettings, answerer: Answerer, source: Path
) -> None:
    output = source.with_name("out.jsonl")

    def run(**options: Any) -> list[int]:
        selection = RowSelection(**options)
        files = (source, output)
        asyncio.run(answered(settings, answerer, *files, selection=selection, ordered=True))
        return [json.loads(line)["row"] for line in output.read_text().splitlines()]

    wanted = chosen(source, sample=50)
    assert run(sample=50) == wanted
    # what is cut off is made again at its place; a row before others can't be
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:-5]))
    assert run(sample=50) == wanted
    with pytest.raises(DatasetError, match=r"the output has rows behind row \d+, which is still"):
        run(sample=60)
    with pytest.raises(ConfigurationError, match="--ordered is the input's order"):
        run(shuffle=True)


def test_errors_that_are_not_chosen_stand(
    settings: QueueSettings, answerer: Answerer, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n' + '{"prompt": ""}\n' * 9)
    asyncio.run(answered(settings, answerer, source, output))
    selection = RowSelection(limit=5)
    files = (source, output)
    done = asyncio.run(answered(settings, answerer, *files, selection=selection, retry_errors=True))
    assert (done.rows, done.errors, done.resumed, done.errors_before) == (4, 4, 1, 0)
    assert len(output.read_bytes().splitlines()) == 10
