"""What a report shows of a run, gathered in bounded memory: against a count of the same by hand."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from kits.client_kit import Answerer

from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.columns import Row
from queue_api.datasets.distribution import Distribution
from queue_api.datasets.formats.row_sink import MadeRow
from queue_api.datasets.layout.layout import Layout
from queue_api.datasets.run import open_dataset
from queue_api.datasets.run_statistics import FIRST_BUCKET_S, MOST_BUCKETS, Origin, RunStatistics
from queue_api.wire.schemas import (
    ErrorDetail,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    JobTimings,
)

NUM_ROWS = 60


class Clock:
    """Says what it is told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def a_row(number: int) -> Row:
    request = GenerationRequest(id=f"i{number}", prompt=f"p{number}")
    return Row(number, {}, f"i{number}", request, row=number)


def a_result(number: int, **fields: Any) -> GenerationResult:
    given = {"finish_reason": FinishReason.STOP, "prompt_tokens": 5, "completion_tokens": 7}
    return GenerationResult(id=f"i{number}", text=f"t{number}", **{**given, **fields})


@given(st.lists(st.floats(0, 40_000), min_size=1, max_size=60))
def test_what_is_counted_over_time_stands_where_it_was_however_long_it_took(
    moments: list[float],
) -> None:
    clock = Clock()
    statistics = RunStatistics(clock)
    statistics.start()
    for number, moment in enumerate(sorted(moments)):
        clock.now = 1000.0 + moment
        statistics.add(a_row(number), a_result(number), Origin.MADE)
    found = statistics.as_json()["over_time"]
    width = found["bucket_s"]
    assert len(found["made"]) <= MOST_BUCKETS
    assert max(moments) < width * MOST_BUCKETS
    assert width == FIRST_BUCKET_S or max(moments) >= width / 2 * MOST_BUCKETS * (1 - 1e-9), (
        "no wider than it must"
    )
    assert sum(found["made"]) == len(moments)
    assert found["completion_tokens"] == [7 * count for count in found["made"]]
    # a moment at the very edge of a bucket may be on either side of it
    passed = 0
    for place, count in enumerate(found["made"]):
        passed += count
        end = (place + 1) * width
        assert (
            sum(m < end - 1e-6 for m in moments) <= passed <= sum(m < end + 1e-6 for m in moments)
        )


@given(st.lists(st.integers(0, 5000), min_size=1), st.booleans())
def test_a_distribution_is_what_counting_by_hand_says(values: list[int], as_times: bool) -> None:
    spread = Distribution(is_logarithmic=as_times)
    numbers = [value / 1000 for value in values] if as_times else values
    for value in numbers:
        spread.add(value)
    found = spread.as_json()
    ordered = sorted(numbers)
    assert found["count"] == len(numbers)
    assert (found["min"], found["max"]) == (ordered[0], ordered[-1])
    assert found["sum"] == pytest.approx(sum(numbers))
    assert found["p50"] == ordered[min(len(ordered) // 2, len(ordered) - 1)]
    edges, passed = found["edges"], 0
    assert len(edges) == len(found["counts"]) + 1
    assert edges == sorted(set(edges))
    assert found["counts"][0] and found["counts"][-1], "it begins and ends where there are values"
    for edge, count in zip(edges[1:], found["counts"], strict=True):
        passed += count
        low, high = edge * (1 - 1e-9), edge * (1 + 1e-9)
        assert sum(v < low for v in numbers) <= passed <= sum(v < high for v in numbers)
    assert passed == len(numbers)


def many_results(count: int) -> Iterator[GenerationResult]:
    """As diverse as strangers can make them."""
    draw = random.Random(3)
    for number in range(count):
        is_error = number % 3 == 0
        yield a_result(
            number,
            finish_reason=FinishReason.ERROR if is_error else FinishReason.LENGTH,
            error=ErrorDetail(code=f"code{number}", message="m" * 5000) if is_error else None,
            completion_tokens=draw.randrange(1, 100_000),
            worker=f"worker{number}",
            model=f"model{number}",
            timings=JobTimings(queue_s=10 ** draw.uniform(-9, 5), stage_s=[0.1, 0.2]),
        )


def test_it_does_not_grow_with_the_rows() -> None:
    sizes = []
    for count in (3_000, 12_000):
        clock = Clock()
        statistics = RunStatistics(clock)
        for number, result in enumerate(many_results(count)):
            clock.now += 1
            statistics.add(a_row(number), result, Origin.MADE)
        found = statistics.as_json()
        sizes.append(len(json.dumps(found)))
        assert sum(kind["count"] for kind in found["errors"]) == count // 3
        assert sum(worker["requests"] for worker in found["workers"]) == count
        busy = [sum(worker["stage_s"][stage] for worker in found["workers"]) for stage in (0, 1)]
        assert busy == pytest.approx([0.1 * count, 0.2 * count])
    assert sizes[1] < 1.2 * sizes[0]


def test_samples_are_drawn_evenly_from_the_texts() -> None:
    statistics = RunStatistics()
    for number in range(2000):
        wrong = {"finish_reason": FinishReason.ERROR} if number % 2 else {}
        statistics.add(a_row(number), a_result(number, **wrong), Origin.MADE)
    found = statistics.as_json()["samples"]
    assert len(found) == 8
    assert all(sample["row"] % 2 == 0 and sample["text"] == f"t{sample['row']}" for sample in found)
    assert max(sample["row"] for sample in found) > 1000, "not the first ones alone"


def write_rows(path: Path, count: int = NUM_ROWS) -> Path:
    rows = [{"id": i, "prompt": f"p{i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def gathered(
    settings: QueueSettings,
    answerer: Answerer | None,
    *files: Path,
    layout: Layout | None = None,
    until_queued: bool = False,
) -> dict[str, Any]:
    """What a run's statistics say; with `until_queued` it is broken off when its rows are asked."""
    statistics = RunStatistics()
    async with (
        Client(settings=settings) as client,
        open_dataset(*files, layout=layout) as dataset,
    ):
        work = asyncio.create_task(dataset.run(client, statistics=statistics))
        if until_queued:
            while not client.store.rq_connection.llen("rq:queue:batchmill"):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            work.cancel()
            await asyncio.wait([work])
        else:
            assert answerer is not None
            async with answerer.answering():
                await work
    return statistics.as_json()


def test_rows_are_told_apart_by_the_life_that_made_them(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer, tmp_path: Path
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    asyncio.run(gathered(settings, None, source, output, until_queued=True))
    waiting = answerer.answer()
    assert 0 < waiting <= NUM_ROWS
    second = asyncio.run(gathered(settings, answerer, source, output))
    assert second["rows"]["found"] == waiting
    assert second["rows"]["made"] == NUM_ROWS - waiting
    assert second["tokens"]["found"] == {"prompt": 2 * waiting, "completion": 3 * waiting}
    assert sum(second["over_time"]["completion_tokens"]) == 3 * (NUM_ROWS - waiting)
    assert second["times_s"]["total"]["count"] == NUM_ROWS - waiting
    # rows appended since: the others stand, and are of another life
    write_rows(source, NUM_ROWS + 5)
    third = asyncio.run(gathered(settings, answerer, source, output))
    counts = {name: third["rows"][name] for name in ("in", "out", "before", "made", "found")}
    assert counts == {
        "in": NUM_ROWS + 5,
        "out": NUM_ROWS + 5,
        "before": NUM_ROWS,
        "made": 5,
        "found": 0,
    }


def test_rows_that_are_being_written_when_a_run_is_broken_off_count(
    settings: QueueSettings, answerer: Answerer, tmp_path: Path
) -> None:
    """They are in the output: a run that went on in this process would count none of them again."""
    source, output = write_rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    began, goes_on = threading.Event(), threading.Event()
    statistics = RunStatistics()

    async def broken_off() -> int:
        async with Client(settings=settings) as client, open_dataset(source, output) as dataset:
            append = dataset.sink.append

            def slowly(rows: Sequence[MadeRow]) -> None:
                began.set()
                assert goes_on.wait(60)
                append(rows)

            dataset.sink.append = slowly  # type: ignore[method-assign]
            async with answerer.answering():
                work = asyncio.create_task(dataset.run(client, statistics=statistics))
                await asyncio.to_thread(began.wait, 60)
                work.cancel()
                await asyncio.sleep(0)
                goes_on.set()
                await asyncio.wait([work])
            assert work.cancelled()
            return dataset.sink.rows

    written = asyncio.run(broken_off())
    assert 0 < written <= NUM_ROWS
    found = statistics.as_json()["rows"]
    assert (found["made"], found["out"]) == (written, written)


def test_turns_before_the_last_are_tokens_and_no_rows(
    settings: QueueSettings, answerer: Answerer, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    rows = [{"id": i, "turns": ["a", "b", "c"][: i % 3 + 1]} for i in range(9)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    layout = Layout(turns_column="turns")
    found = asyncio.run(gathered(settings, answerer, source, tmp_path / "out.jsonl", layout=layout))
    asked = sum(len(row["turns"]) for row in rows)
    assert (found["rows"]["made"], found["earlier_turns"]) == (9, asked - 9)
    assert found["tokens"]["made"] == {"prompt": 2 * asked, "completion": 3 * asked}
    assert sum(found["over_time"]["made"]) == 9
    assert Counter(found["finish_reasons"]["made"]) == {"stop": 9}
