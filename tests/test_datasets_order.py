"""Rows in the order of the input, whatever order they are answered in."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from kits.client_kit import Answerer

from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.columns import Row
from queue_api.datasets.error_limit import ErrorLimit, ErrorWatch
from queue_api.datasets.in_order import InOrder
from queue_api.datasets.run import run_dataset
from queue_api.wire.errors import ConfigurationError, DatasetError, RequestError

NUM_ROWS = 200


def row(index: int) -> Row:
    return Row(index, {}, str(index), RequestError("unused"))


@given(
    st.permutations(range(12)),
    st.sets(st.integers(0, 11)),
    st.lists(st.integers(1, 5), min_size=12),
    st.integers(0, 3),
)
def test_rows_come_in_order_and_nothing_unwritten_is_let_go_of(
    answers: list[int], resumed: set[int], sizes: list[int], early: int
) -> None:
    written = set(resumed)
    order = InOrder(resumed.__contains__)
    entry_of: dict[int, int] = {}
    taken: list[int] = []
    left = [index for index in answers if index not in resumed]
    for index in left[:early]:  # read from the stream by an earlier process
        order.put(row(index), b"", None)
        entry_of[index] = 0
    left = left[early:]
    for entry, size in enumerate(sizes, 1):
        some, left = left[:size], left[size:]
        for index in some:
            entry_of[index] = entry
            order.put(row(index), b"", f"{entry}-0")
        taken += [found.index for found, _ in order.take()]
        written |= set(taken)
        through = order.through()
        if through is not None:
            last = int(through.split("-")[0])
            assert all(i in written for i, place in entry_of.items() if place <= last)
    assert taken == sorted(set(range(12)) - resumed)
    assert len(order) == 0


class Backwards(Answerer):
    """Answers the last job first."""

    def answer(self, jobs: int = 1, queue: str = "batchmill") -> int:
        self.connection.lmove(f"rq:queue:{queue}", f"rq:queue:{queue}", "RIGHT", "LEFT")
        return super().answer(1, queue)


def ids_of(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [{"id": i, "prompt": f"p{i}"} for i in range(NUM_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("seed", range(4))
def test_an_ordered_run_broken_off_anywhere_ends_in_order(
    settings: QueueSettings, connection: redis.Redis, source: Path, seed: int
) -> None:
    draw = random.Random(seed)
    output = source.with_name("out.jsonl")

    async def life(enough: int | None) -> None:
        seen = asyncio.Event()
        async with Client(settings=settings) as client, Backwards(connection).answering():
            work = asyncio.create_task(
                run_dataset(
                    client,
                    source,
                    output,
                    chunk_size=4,
                    window=32,
                    ordered=True,
                    on_progress=lambda told: seen.set() if told.done >= (enough or 0) else None,
                )
            )
            if enough is not None:
                ended = asyncio.create_task(seen.wait())
                await asyncio.wait([work, ended], return_when=asyncio.FIRST_COMPLETED)
                work.cancel()
            await asyncio.wait([work])

    for _ in range(2):
        asyncio.run(life(draw.randrange(1, NUM_ROWS)))
        assert ids_of(output) == list(range(len(ids_of(output))))
        if draw.random() < 0.5:
            connection.flushall()
    asyncio.run(life(None))
    assert ids_of(output) == list(range(NUM_ROWS))


def test_what_can_only_be_put_at_the_end_is_refused_in_order(
    settings: QueueSettings, connection: redis.Redis, source: Path
) -> None:
    output = source.with_name("out.jsonl")

    async def run(*, ordered: bool) -> None:
        async with Client(settings=settings) as client, Answerer(connection).answering():
            await run_dataset(client, source, output, ordered=ordered)

    asyncio.run(run(ordered=False))
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(line for line in lines if json.loads(line)["id"] != 5))
    with pytest.raises(DatasetError, match="rows behind row 5, which is still to be made"):
        asyncio.run(run(ordered=True))
    asyncio.run(run(ordered=False))
    assert sorted(ids_of(output)) == list(range(NUM_ROWS))


@pytest.mark.parametrize(
    ("given", "outcomes", "exceeded"),
    [
        ("3", "e" * 3, False),
        ("3", "e" * 4, True),
        (0, "e", True),
        ("5%", "e" * 99, False),  # too few to say
        ("5%", "e" * 100, True),
        ("5%", "." * 950 + "e" * 50, False),
        ("5%", "." * 5000 + "e" * 51, True),  # what went well long ago is no comfort
        (None, "e" * 5000, False),
    ],
)
def test_errors_are_counted_or_watched_over_the_last_rows(
    given: str | int | None, outcomes: str, exceeded: bool
) -> None:
    watch = ErrorWatch(ErrorLimit.of(given))
    for outcome in outcomes:
        watch.note(is_error=outcome == "e")
    assert bool(watch.exceeded(outcomes.count("e"), len(outcomes))) == exceeded


@pytest.mark.parametrize("given", ["-1", "101%", "five", "0.1", ""])
def test_a_limit_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(ConfigurationError, match="max-errors is"):
        ErrorLimit.of(given)
