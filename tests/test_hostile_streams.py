"""Whoever may write to a run's stream can falsify it, but ends nobody's reading."""

from __future__ import annotations

import asyncio
import json

import pytest
from kits.client_kit import Answerer
from kits.worker_kit import until

from queue_api.client.client import Client
from queue_api.datasets.run import run_dataset
from queue_api.store.bitmap import Bitmap
from queue_api.store.keys import RunKeys
from queue_api.store.run_store import read_entries

ODD = [
    {"-1": "{}"},
    {str(2**31): "{}"},
    {str(2**63): "{}"},
    {"9" * 5000: "{}"},
    {"": "{}"},
    {"0x1": "{}"},
    {"007": "{}"},
    {"1_0": "{}"},
    {"\u0663": "{}"},
    {b"\xff\xfe": "{}"},
    {"result": "{}"},
    {"result": "{}", "index": "-7"},
    {"index": "1"},
    {"1000000000": "{}"},
]


@pytest.mark.parametrize("known", [True, False], ids=["total known", "total unknown"])
def test_the_rest_is_read_all_the_same(connection, settings, known):
    key = RunKeys.of("run").results

    async def main() -> list[tuple[int, str]]:
        async with Client(settings=settings) as client:
            if known:
                run = await client.submit(["a", "b"], "run")
            else:
                await client.store.open("run", queue="batchmill", chunk_size=32)
                run = client.run("run")
            for entry in ODD:
                connection.xadd(key, entry)
            reading = asyncio.create_task(read(run))
            await asyncio.to_thread(until, lambda: connection.info("clients")["blocked_clients"])
            if not known:
                await client.submit(["a", "b"], "run")
            Answerer(connection).answer()
            return await reading

    async def read(run) -> list[tuple[int, str]]:
        return [(r.index, r.text) async for r in run.results() if r.ok]

    found = asyncio.run(asyncio.wait_for(main(), 60))
    assert found == [(0, "answer to a"), (1, "answer to b")]


def test_a_call_gets_its_answer(connection, settings):
    async def main() -> str:
        async with Client(settings=settings) as client:
            asking = asyncio.create_task(client.generate("a"))
            await asyncio.to_thread(until, lambda: connection.llen("rq:queue:batchmill"))
            (key,) = connection.keys("batchmill:{calls-*}")
            for entry in ODD:
                connection.xadd(key.decode() + ":results", entry)
            Answerer(connection).answer()
            return (await asking).text

    assert asyncio.run(asyncio.wait_for(main(), 60)) == "answer to a"


def test_a_dataset_run_writes_its_rows_and_trims(connection, settings, tmp_path):
    rows, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(8)))
    for entry in ODD:
        connection.xadd(RunKeys.of("run").results, entry)

    async def main() -> int:
        async with Client(settings=settings) as client, Answerer(connection).answering():
            return (await run_dataset(client, rows, answers, run="run")).rows

    assert asyncio.run(asyncio.wait_for(main(), 60)) == 8
    texts = [json.loads(line)["text"] for line in answers.read_text().splitlines()]
    assert sorted(texts) == [f"answer to {i}" for i in range(8)]
    assert connection.xlen(RunKeys.of("run").results) == 0


def test_good_fields_beside_odd_ones_are_kept():
    entries = [(b"1-0", {b"-1": b"x", b"3": b"y", b"nan": b"z"}), (b"2-0", {b"0": b"w"})]
    assert read_entries(entries) == [("1-0", 3, b"y"), ("2-0", 0, b"w")]


def test_a_bitmap_counts_its_beginning():
    bits = Bitmap()
    for index in (0, 7, 8, 9, 40):
        bits.add(index)
    assert [bits.count_below(end) for end in (0, 1, 8, 9, 40, 41, 1000)] == [0, 1, 2, 3, 4, 5, 5]
