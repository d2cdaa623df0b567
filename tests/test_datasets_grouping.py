"""Rows whose prompts begin alike are asked for together: the same rows, in another order."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.client_kit import Answerer

from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.columns import RowParser
from queue_api.datasets.formats.opening import open_source
from queue_api.datasets.layout.layout import Layout
from queue_api.datasets.prefix_order import prefix_order
from queue_api.datasets.row_selection import RowSelection
from queue_api.datasets.run import run_dataset
from queue_api.wire.errors import ConfigurationError, DatasetError

NUM_ROWS, NUM_GROUPS = 200, 5
BEGINNING = "Answer as the examples do. Q: What is {group} + 1? A: one more. " * 3


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixed(num_rows: int, num_groups: int, seed: int = 0, **fields: Any) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows = [
        {"prompt": f"{BEGINNING.format(group=i % num_groups)}Q: {draw.random()}?", **fields}
        for i in range(num_rows)
    ]
    draw.shuffle(rows)
    return rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", mixed(NUM_ROWS, NUM_GROUPS))


def order(
    rows: Sequence[dict[str, Any]], num_lanes: int, chunk_size: int, layout: Layout | None = None
) -> Sequence[int]:
    """The numbers of the rows as they are asked for."""
    parser = RowParser(layout=layout or Layout())
    with closing(open_source(rows)) as source:
        return prefix_order(source, parser, num_lanes=num_lanes, chunk_size=chunk_size)


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(1, 120),
    num_groups=st.integers(1, 9),
    num_lanes=st.integers(1, 5),
    chunk_size=st.integers(1, 40),
    seed=st.integers(0, 3),
)
def test_each_row_is_asked_for_once_and_a_lane_has_whole_groups(
    num_rows: int, num_groups: int, num_lanes: int, chunk_size: int, seed: int
) -> None:
    rows = mixed(num_rows, num_groups, seed)
    found = order(rows, num_lanes, chunk_size)
    assert sorted(found) == list(range(num_rows))
    lanes: dict[int, list[str]] = {}
    for index, number in enumerate(found):
        group = rows[number]["prompt"].rpartition("Q:")[0]
        lanes.setdefault(index // chunk_size % num_lanes, []).append(group)
    in_lanes = sum(len(set(lane)) for lane in lanes.values())
    assert in_lanes <= len({group for lane in lanes.values() for group in lane}) + num_lanes - 1
    for lane in lanes.values():
        changes = sum(a != b for a, b in pairwise(lane))
        assert changes == len(set(lane)) - 1


LAYOUTS: dict[str, Any] = {
    "prompt": lambda text: {"prompt": text},
    "token ids": lambda text: {"prompt": [*text.encode()]},
    "chat": lambda text: {
        "messages": [{"role": "system", "content": text[:-20]}, {"role": "user", "content": text}]
    },
    "another column": lambda text: {"question": text},
    "long": lambda text: {"prompt": text.replace("examples", "examples " * 3000)},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_prompts_are_compared_whatever_they_are_in(name: str) -> None:
    prompts = [row["prompt"] for row in mixed(NUM_ROWS, NUM_GROUPS)]
    layout = Layout(prompt_column="question") if name == "another column" else None
    found = order([LAYOUTS[name](prompt) for prompt in prompts], 1, 32, layout)
    groups = [prompts[number].rpartition("Q:")[0] for number in found]
    assert sum(a != b for a, b in pairwise(groups)) == NUM_GROUPS - 1


def test_rows_that_are_wrong_are_asked_for_too() -> None:
    rows = [{"prompt": 5}, {}, {"prompt": "a", "max_tokens": 10**400}, {"prompt": "\ud800"}]
    rows += [{"messages": "no"}, {"prompt": "b", "max_tokens": "x"}, {"prompt": None}]
    assert sorted(order(rows, 2, 2)) == list(range(len(rows)))


def test_none_of_the_last_rows_is_a_long_one() -> None:
    rows = mixed(6000, NUM_GROUPS, max_tokens=16)
    for row in random.Random(1).sample(rows, 60):
        row["max_tokens"] = 512
    found = order(rows, 2, 32)
    longest_last = max(i for i, number in enumerate(found) if rows[number]["max_tokens"] == 512)
    behind = sum(rows[number]["max_tokens"] for number in found[longest_last:])
    assert behind >= 2 * 64 * 512  # by then two workers of 64 sequences have work for as long


def run(
    settings: QueueSettings, connection: redis.Redis, source: Path, output: Path, **options: Any
) -> None:
    async def work() -> None:
        async with Client(settings=settings) as client, Answerer(connection).answering():
            await run_dataset(client, source, output, chunk_size=4, window=32, **options)

    asyncio.run(work())


def said(path: Path) -> list[tuple[Any, ...]]:
    """What rows say, in the order of the input."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows.sort(key=lambda row: row["row"])
    return [(row["row"], row["id"], row["text"], row["error"], row["fingerprint"]) for row in rows]


def test_a_run_goes_on_grouped_or_not_and_says_the_same(
    settings: QueueSettings, connection: redis.Redis, source: Path, tmp_path: Path
) -> None:
    plain, grouped, both = (tmp_path / f"{name}.jsonl" for name in ("plain", "grouped", "both"))
    run(settings, connection, source, plain)
    run(settings, connection, source, grouped, group_prefixes=2)
    run(settings, connection, source, both, selection=RowSelection(limit=90))
    run(settings, connection, source, both, group_prefixes=3)
    assert len(said(plain)) == NUM_ROWS
    assert said(grouped) == said(plain)
    assert said(both) == said(plain)
    written = grouped.read_bytes()
    run(settings, connection, source, grouped)
    assert grouped.read_bytes() == written


@pytest.mark.parametrize("seed", range(4))
def test_a_grouped_run_broken_off_anywhere_has_each_row_once(
    settings: QueueSettings, connection: redis.Redis, source: Path, seed: int
) -> None:
    draw, output = random.Random(seed), source.with_name("out.jsonl")

    async def life(enough: int | None) -> None:
        seen = asyncio.Event()
        async with Client(settings=settings) as client, Answerer(connection).answering():
            work = asyncio.create_task(
                run_dataset(
                    client,
                    source,
                    output,
                    chunk_size=4,
                    window=32,
                    group_prefixes=2,
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
        if draw.random() < 0.5:
            connection.flushall()
    asyncio.run(life(None))
    assert [row for row, *_ in said(output)] == list(range(NUM_ROWS))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ordered": True}, "--ordered is the input's order"),
        ({"selection": RowSelection(shuffle=True)}, "--shuffle is one order"),
        ({"group_prefixes": -1}, "-1: must be a number of workers"),
    ],
    ids=str,
)
def test_two_orders_are_refused(
    settings: QueueSettings,
    connection: redis.Redis,
    source: Path,
    options: dict[str, Any],
    told: str,
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        run(settings, connection, source, source.with_name("o"), **{"group_prefixes": 2, **options})


def test_what_can_be_read_only_once_is_refused(
    settings: QueueSettings, connection: redis.Redis, source: Path
) -> None:
    async def work() -> None:
        rows = iter([{"prompt": "a"}])
        async with Client(settings=settings) as client:
            await run_dataset(client, rows, source.with_name("o"), group_prefixes=2)

    with pytest.raises(DatasetError, match="only once, and --group-prefixes has to read it twice"):
        asyncio.run(work())
