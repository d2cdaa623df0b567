"""What a producer may put on the queue, in bytes, and what its calls leave behind there."""

from __future__ import annotations

import asyncio

import pytest
import redis
from kits.client_kit import Answerer, rq_queue
from kits.worker_kit import until

from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.store import jobs
from queue_api.store.reconcile import Reconciler
from queue_api.wire.errors import RequestTooLargeError

LIMIT = 8192


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of a job as if they were some thousand bytes."""
    monkeypatch.setattr(jobs, "MAX_PAYLOAD_BYTES", LIMIT)
    monkeypatch.setattr(jobs, "MAX_REQUEST_BYTES", LIMIT - 1024)


@pytest.mark.usefixtures("small")
def test_a_chunk_too_large_for_a_job_is_sent_as_single_requests(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    prompts = [*("short" for _ in range(4)), *(f"{i} " + "é" * 900 for i in range(4)), "é" * 9000]

    async def main() -> None:
        async with Client(settings=settings) as client:
            run = await client.submit(prompts, "r", chunk_size=4)
            ids = ["r-0", *(f"r-i{i}" for i in range(4, 8))]
            assert rq_queue(connection).job_ids == ids
            # again: nothing of it is made twice
            await client.submit(prompts, "r", chunk_size=4)
            assert rq_queue(connection).job_ids == ids
            sweeper = Reconciler(client.store, "r")
            assert [await sweeper.sweep() for _ in range(3)] == [0, 0, 0]
            answerer.answer()
            got = {r.index: r async for r in run.results()}
            assert [got[i].ok for i in range(9)] == [True] * 8 + [False]
            assert got[8].error is not None
            assert got[8].error.code == "request_too_large"

    asyncio.run(main())


@pytest.mark.usefixtures("small")
def test_single_requests_of_a_large_chunk_are_cancelled_and_sent_again_when_lost(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    prompts = [f"{i} " + "é" * 900 for i in range(8)]

    async def main() -> None:
        async with Client(settings=settings) as client:
            run = await client.submit(prompts, "r", chunk_size=8)
            for job_id in rq_queue(connection).job_ids[:3]:
                connection.delete(f"rq:job:{job_id}")
                connection.lrem("rq:queue:batchmill", 1, job_id)
            async with answerer.answering():
                assert len([r async for r in run.results() if r.ok]) == 8
            run = await client.submit(prompts, "s", chunk_size=8)
            assert await run.cancel() == 8
            assert rq_queue(connection).job_ids == []

    asyncio.run(main())


def test_what_no_worker_would_read_is_refused_where_it_is_made(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    # metadata that is small in bytes is fine; so many lists among all of a chunk aren't
    brackets = "[" * (2**19 + 1)

    async def main() -> None:
        async with Client(settings=settings) as client:
            with pytest.raises(RequestTooLargeError, match=r"'\['.*limit is 1048576"):
                await client.generate(brackets * 2)
            run = await client.submit([brackets, brackets, "short", brackets * 2], "r")
            assert rq_queue(connection).job_ids == ["r-i0", "r-i1", "r-i2"]
            answerer.answer()
            got = {r.index: r.error and r.error.code async for r in run.results()}
            assert got == {0: None, 1: None, 2: None, 3: "request_too_large"}

    asyncio.run(main())


@pytest.mark.usefixtures("small")
def test_a_call_too_large_for_a_job_is_told_at_once(
    settings: QueueSettings, connection: redis.Redis
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            for own in (None, "own"):
                with pytest.raises(RequestTooLargeError, match=f"limit is {LIMIT - 1024}"):
                    await client.generate("é" * 9000, id=own)

    asyncio.run(main())
    assert connection.keys("rq:*") == []


def test_calls_that_were_given_up_dont_fill_rqs_registry(
    settings: QueueSettings, connection: redis.Redis
) -> None:
    queue = rq_queue(connection)

    async def main() -> None:
        async with Client(settings=settings) as client:
            kept = await client.submit(["kept"], "kept")
            await kept.cancel()
            for _ in range(12):
                calls = [asyncio.create_task(client.generate(f"{i}")) for i in range(20)]
                await asyncio.to_thread(until, lambda: len(queue) == 20)
                for call in calls:
                    call.cancel()
                await asyncio.to_thread(until, lambda: not len(queue))
                gone = connection.keys("rq:job:calls-*")
                connection.delete(*gone)  # as when their time is over

    asyncio.run(main())
    ids = queue.canceled_job_registry.get_job_ids()
    assert "kept-0" in ids
    assert len(ids) < 80, "all 241 stay"
