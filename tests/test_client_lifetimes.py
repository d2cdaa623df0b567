"""A run's keys live and lapse together, and what is missing of it is said, not passed over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import redis
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from kits.client_kit import Answerer, rq_job, rq_queue
from kits.worker_kit import until

from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.run import run_dataset
from queue_api.store.bitmap import Bitmap
from queue_api.store.keys import RunKeys
from queue_api.store.reconcile import Reconciler
from queue_api.wire.errors import InvalidRequestError, RunIncompleteError, RunNotFoundError

PROMPTS = [f"prompt {i}" for i in range(10)]
KEYS = RunKeys.of("r")
LIFE_S = 1000

TOUCHES: dict[str, Callable[[Client], Awaitable[object]]] = {
    "submit again": lambda client: client.submit(PROMPTS, "r", chunk_size=2),
    "cancel": lambda client: client.cancel("r"),
    "set": lambda client: client.store.set("r", submitted=10),
    "reopen": lambda client: client.store.reopen("r", [1]),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_what_touches_a_run_gives_all_its_keys_the_same_time(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer, touch: str
) -> None:
    own = settings.model_copy(update={"run_ttl_s": LIFE_S})

    async def main() -> None:
        async with Client(settings=own) as client:
            await client.submit(PROMPTS, "r", chunk_size=2)
            answerer.answer(jobs=3)
            for key in KEYS:  # as if that were long ago
                connection.expire(key, 60)
            await TOUCHES[touch](client)

    asyncio.run(main())
    times = [connection.ttl(key) for key in KEYS]
    assert LIFE_S - 60 < min(times) <= max(times) <= LIFE_S


def test_a_run_made_anew_has_nothing_of_one_that_is_gone(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            await client.submit(PROMPTS, "r")
            answerer.answer()
            connection.delete(KEYS.hash)
            run = await client.submit(PROMPTS, "r")
            assert len(rq_queue(connection)) == 1
            answerer.answer()
            assert len([result async for result in run.results()]) == 10
            assert (await run.status()).done == 10

    asyncio.run(main())


def test_fields_make_no_run(settings: QueueSettings, connection: redis.Redis) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            with pytest.raises(RunNotFoundError):
                await client.store.set("r", total=10)
            with pytest.raises(RunNotFoundError):
                await client.store.add("r", content="x")

    asyncio.run(main())
    assert not connection.exists(*KEYS)


@pytest.mark.parametrize("is_complete", [True, False], ids=["after its end", "amid it"])
def test_results_of_a_trimmed_stream_dont_end_as_if_they_were_all(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer, is_complete: bool
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            run = await client.submit(PROMPTS, "r", chunk_size=2)
            answerer.answer(jobs=5 if is_complete else 3)
            connection.xtrim(KEYS.results, 2, approximate=False)
            results, num_told = client.run("r").results(), 0
            with pytest.raises(RunIncompleteError, match="of its 10 results aren't on its stream"):
                async with answerer.answering():
                    while await anext(results):
                        num_told += 1
            assert 0 < num_told < 10
            assert (await run.wait()).complete

    asyncio.run(main())


def drop(*keys: str) -> Callable[[redis.Redis], object]:
    return lambda connection: connection.delete(*keys)


def lease(connection: redis.Redis) -> None:
    """A worker takes the first job, and somebody deletes RQ's registry of what is held."""
    connection.lpop("rq:queue:batchmill")
    connection.hset("rq:job:r-0", "status", "started")
    connection.zadd("rq:executions:r-0", {"e": 2**33})
    connection.delete("rq:wip:batchmill")


def schedule(connection: redis.Redis) -> None:
    """A job waits for the time of its retry, and somebody deletes the registry of such."""
    connection.lpop("rq:queue:batchmill")
    connection.hset("rq:job:r-0", "status", "scheduled")


DELETIONS: dict[str, tuple[Callable[[redis.Redis], object], int]] = {
    "queue": (drop("rq:queue:batchmill"), 5),
    "end of the queue": (lambda c: c.ltrim("rq:queue:batchmill", 0, 2), 2),
    "leases": (lease, 1),
    "scheduled": (schedule, 1),
}
"""What is deleted, and how many of five jobs are then nowhere."""


@pytest.mark.parametrize("what", DELETIONS)
@pytest.mark.parametrize("has_requests", [True, False], ids=["list", "iterator"])
def test_jobs_whose_place_was_deleted_under_them_are_sent_again_or_end(
    settings: QueueSettings,
    connection: redis.Redis,
    answerer: Answerer,
    what: str,
    has_requests: bool,
) -> None:
    delete, num_lost = DELETIONS[what]

    async def main() -> None:
        async with Client(settings=settings) as client:
            prompts = PROMPTS if has_requests else iter(PROMPTS)
            run = await client.submit(prompts, "r", chunk_size=2)
            delete(connection)
            async with answerer.answering(), asyncio.timeout(60):
                got = [result async for result in run.results()]
            assert sorted(result.index for result in got) == list(range(10))
            codes = [result.error.code for result in got if result.error]
            assert codes == ([] if has_requests else ["job_lost"] * 2 * num_lost)

    asyncio.run(main())


def test_a_call_whose_queue_was_deleted_is_sent_again(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            call = asyncio.create_task(client.generate("hello", timeout=60))
            await asyncio.to_thread(until, lambda: len(rq_queue(connection)) == 1)
            connection.delete("rq:queue:batchmill")
            async with answerer.answering():
                assert (await call).text == "answer to hello"

    asyncio.run(main())


def test_jobs_that_are_where_they_should_be_are_waited_for(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            run = await client.submit(PROMPTS, "r", chunk_size=2)
            # held by workers: one that lives, and one that died before anybody reclaimed it
            for job_id in ("r-0", "r-1"):
                connection.lpop("rq:queue:batchmill")
                connection.hset(f"rq:job:{job_id}", "status", "started")
                connection.zadd("rq:wip:batchmill", {f"{job_id}:e": 1})
            connection.zadd("rq:executions:r-0", {"e": 2**33})
            # taken by a worker of RQ's own that hasn't begun it
            connection.lmove("rq:queue:batchmill", "rq:queue:batchmill:intermediate")
            connection.lpop("rq:queue:batchmill")
            connection.hset("rq:job:r-3", "status", "scheduled")
            connection.zadd("rq:scheduled:batchmill", {"r-3": 2**33})
            sweeper = Reconciler(client.store, "r")
            assert [await sweeper.sweep() for _ in range(3)] == [0, 0, 0]
            assert (await run.status()).done == 0

    asyncio.run(main())


@pytest.mark.parametrize("queue", ["batchmill", "other"])
def test_jobs_of_a_run_that_is_gone_make_way_for_those_of_a_new_one(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer, queue: str
) -> None:
    """It lapsed while nobody served the queue, or somebody deleted its keys."""
    anew = [f"another {i}" for i in range(6)]

    async def main() -> list[str | None]:
        async with Client(settings=settings) as client:
            await client.submit(PROMPTS, "r", chunk_size=2)
            rq_queue(connection).remove("r-1")
            rq_job(connection, "r-1").delete()
            connection.delete(*KEYS)
            for _ in range(2):  # the second time they are its own
                run = await client.submit(anew, "r", queue=queue, chunk_size=2)
            assert rq_queue(connection, queue).job_ids[-3:] == ["r-0", "r-1", "r-2"]
            assert len(rq_queue(connection, queue)) == (5 if queue == "batchmill" else 3)
            answerer.answer(queue=queue)
            results = sorted([r async for r in run.results()], key=lambda r: r.index)
            return [result.text for result in results]

    texts = asyncio.run(asyncio.wait_for(main(), 60))
    assert texts == [f"answer to {prompt}" for prompt in anew]


def test_a_run_stays_on_its_queue_and_who_names_another_is_told(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer, tmp_path: Path
) -> None:
    """Workers of the other may have another model, and would never see its jobs."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n')
    told = "is on queue 'one', not on 'two'"

    async def main() -> None:
        async with Client(settings=settings, queue="one") as client:
            await client.submit(PROMPTS, "r", chunk_size=2)
            with pytest.raises(InvalidRequestError, match=told):
                await client.submit(PROMPTS, "r", queue="two")
            await client.submit(PROMPTS, "r")
            await client.store.open("d", queue="one", fingerprint="any", chunk_size=2)
            with pytest.raises(InvalidRequestError, match=told):
                await run_dataset(client, source, output, run="d", queue="two")

    asyncio.run(main())
    assert len(rq_queue(connection, "one")) == 5
    assert len(rq_queue(connection, "two")) == 0


def test_a_job_of_another_type_hides_no_lost_one(
    settings: QueueSettings, connection: redis.Redis
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            await client.submit(iter(PROMPTS), "r", chunk_size=2)
            connection.delete("rq:queue:batchmill", "rq:job:r-1")
            connection.set("rq:job:r-1", "somebody's")
            found = await client.store.misplaced("batchmill", [f"r-{i}" for i in range(5)])
            assert found == ["r-0", "r-2", "r-3", "r-4"]

    asyncio.run(main())


@given(st.sets(st.integers(0, 40_000)), st.integers(0, 40_000), st.integers(0, 40_000))
@settings_of(deadline=None)
def test_what_is_missing_of_a_bitmap_is_what_isnt_in_the_set(
    few: set[int], start: int, end: int
) -> None:
    for members in (few, set(range(40_000)) - few):
        bitmap = Bitmap()
        for index in members:
            bitmap.add(index)
        assert list(bitmap.missing(end, start)) == [
            i for i in range(start, end) if i not in members
        ]
