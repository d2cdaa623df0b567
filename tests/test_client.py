"""Submitting runs and reading them, up to the edge of Redis; RQ's own API is the oracle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis
from kits.client_kit import Answerer, rq_job, rq_queue, run_keys
from kits.worker_kit import until
from rq import SimpleWorker
from rq.job import JobStatus

from queue_api.client.client import Client
from queue_api.client.reader import MOST_UNREAD
from queue_api.client.sync_client import SyncClient
from queue_api.connection.embedded import EmbeddedRedis
from queue_api.connection.settings import QueueSettings
from queue_api.store.jobs import GENERATE
from queue_api.store.keys import RunKeys
from queue_api.wire.errors import (
    InvalidRequestError,
    QueueFullError,
    RedisAuthError,
    RedisUnavailableError,
    RunIncompleteError,
    RunNotFoundError,
)
from queue_api.wire.schemas import FinishReason, GenerationRequest, GenerationResult, SamplingParams

pytestmark = pytest.mark.servers

PROMPTS = [f"prompt {i}" for i in range(10)]


async def all_results(client: Client, run: str) -> dict[int, GenerationResult]:
    got = [result async for result in client.run(run).results()]
    by_index = {result.index: result for result in got}
    assert len(by_index) == len(got), "a request has two results"
    return by_index


def test_a_run_is_ordinary_rq_jobs(settings: QueueSettings, connection: redis.Redis) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            await client.submit(PROMPTS, "r", chunk_size=4, defaults=SamplingParams(max_tokens=5))

    asyncio.run(main())
    jobs = rq_queue(connection).jobs
    assert [job.id for job in jobs] == ["r-0", "r-1", "r-2"]
    assert [len(job.kwargs["requests"]) for job in jobs] == [4, 4, 2]
    first = jobs[0]
    assert first.func_name == "batchmill.generate"
    assert first.get_status() is JobStatus.QUEUED
    assert (first.timeout, first.retries_left, first.result_ttl) == (-1, 3, settings.job_ttl_s)
    assert first.enqueued_at is not None
    assert first.kwargs["requests"][1] == [
        1,
        {"id": "1", "prompt": "prompt 1", "sampling": {"max_tokens": 5}},
    ]


def test_submitting_again_enqueues_only_what_is_neither_done_nor_alive(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    async def submit() -> None:
        async with Client(settings=settings) as client:
            await client.submit(iter(PROMPTS), "r", chunk_size=2)

    asyncio.run(submit())
    assert answerer.answer(jobs=2) == 4
    rq_job(connection, "r-3").delete()
    assert rq_queue(connection).job_ids == ["r-2", "r-4"]
    asyncio.run(submit())
    assert rq_queue(connection).job_ids == ["r-2", "r-4", "r-3"]


@pytest.mark.parametrize(
    "others",
    [["another", *PROMPTS[1:]], [*PROMPTS[:9], "another"], PROMPTS[:9], [*PROMPTS, "more"]],
    ids=["first", "last", "fewer", "more"],
)
@pytest.mark.parametrize("repeated", [1, 20], ids=["short", "long"])
def test_other_requests_under_the_same_run_are_refused(
    settings: QueueSettings, others: list[str], repeated: int
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            await client.submit(PROMPTS * repeated, "r")
            before = await client.status("r")
            with pytest.raises(InvalidRequestError, match="other requests"):
                await client.submit(PROMPTS * (repeated - 1) + others, "r")
            assert await client.status("r") == before

    asyncio.run(main())


def test_wrong_requests_end_alone(settings: QueueSettings, answerer: Answerer) -> None:
    given: list[Any] = [
        "fine",
        {"prompt": "", "id": "empty"},
        {"prompt": "x", "id": "0"},
        {"prompt": "x", "max_tokens": 0},
        17,
        GenerationRequest(id="own", prompt="fine"),
    ]

    async def main() -> dict[int, GenerationResult]:
        async with Client(settings=settings) as client:
            await client.submit(given, "r")
            answerer.answer()
            return await all_results(client, "r")

    got = asyncio.run(main())
    assert [got[i].id for i in range(6)] == ["0", "empty", "0", "3", "4", "own"]
    assert [got[i].ok for i in range(6)] == [True, False, False, False, False, True]
    assert [got[i].error.code for i in (1, 2)] == ["invalid_request", "duplicate_id"]  # type: ignore[union-attr]
    assert "'max_tokens' is 0: must be at least 1" in str(got[3].error)


def test_a_request_has_one_result_however_many_are_emitted(
    settings: QueueSettings, answerer: Answerer
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            await client.submit(PROMPTS, "r")
            late = [
                GenerationResult(
                    id=str(i), index=i, text="late", finish_reason="stop", completion_tokens=1
                )
                for i in range(10)
            ]
            assert await client.store.emit("r", late[:4]) == 4
            answerer.answer()
            assert await client.store.emit("r", late) == 0
            got = await all_results(client, "r")
            assert [got[i].text == "late" for i in range(10)] == [True] * 4 + [False] * 6
            status = await client.status("r")
            assert (status.done, status.completion_tokens) == (10, 4 + 6 * 3)
            assert status.finish_reasons == {"stop": 10}

    asyncio.run(main())


def test_results_can_be_read_again_and_elsewhere_while_they_come(
    settings: QueueSettings, answerer: Answerer
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as producer, Client(settings=settings) as reader:
            run = await producer.submit(PROMPTS, "r", chunk_size=1)
            answerer.answer(jobs=3)
            results = reader.run("r").results()
            early = [await anext(results) for _ in range(3)]
            assert [result.index for result in early] == [0, 1, 2]
            async with answerer.answering():
                rest = [result async for result in results]
            assert [result.index for result in early + rest] == list(range(10))
            assert len(await all_results(producer, "r")) == 10
            assert (await run.wait()).complete

    asyncio.run(main())


def test_jobs_that_failed_were_deleted_or_cancelled_become_results(
    settings: QueueSettings, connection: redis.Redis
) -> None:
    # stock RQ can't import the label and puts the job into the dead letter: its words arrive if it
    # was a worker of ours that claimed the job; else it goes to one of ours (test_rq_strangers.py)
    async def main() -> dict[int, GenerationResult]:
        async with Client(settings=settings) as client:
            await client.submit(PROMPTS[:3], "r", chunk_size=1)
            rq_job(connection, "r-1").delete()
            rq_job(connection, "r-2").cancel()
            await asyncio.to_thread(_work_like_stock_rq, connection)
            ended_by = connection.hget("rq:job:r-0", "worker_name")
            connection.hset("rq:job:r-0", "claimed_by", ended_by)
            return await all_results(client, "r")

    got = asyncio.run(main())
    assert [got[i].error.code for i in range(3)] == ["job_failed", "job_lost", "cancelled"]  # type: ignore[union-attr]
    assert "r-0 failed" in str(got[0].error)
    assert got[2].finish_reason is FinishReason.CANCELLED


LOSSES = {
    "everything": lambda c: c.flushall(),
    "jobs": lambda c: c.delete(*c.keys("rq:*")),
    "the end of the submission": lambda c: (
        c.delete("rq:job:r-3", "rq:job:r-4"),
        c.lrem("rq:queue:batchmill", 0, "r-3"),
        c.lrem("rq:queue:batchmill", 0, "r-4"),
        c.hset("batchmill:{r}", mapping={"total": -1, "submitted": 6}),
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_redis_lost_of_a_run_its_producer_sends_again(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer, loss: str
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            run = await client.submit(PROMPTS, "r", chunk_size=2)
            answerer.answer(jobs=2)
            results = run.results()
            told = [await anext(results) for _ in range(3)]
            LOSSES[loss](connection)
            async with answerer.answering():
                told += [result async for result in results]
            assert sorted(result.index for result in told) == list(range(10))
            assert {result.text for result in told} == {f"answer to {p}" for p in PROMPTS}
            # whoever reads it now finds it whole
            assert (await run.status()).complete
            assert len(await all_results(client, "r")) == 10

    asyncio.run(main())


def test_what_redis_lost_of_a_run_ends_in_errors_where_nobody_has_the_requests(
    settings: QueueSettings, connection: redis.Redis
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            run = await client.submit(iter(PROMPTS), "r", chunk_size=2)
            LOSSES["jobs"](connection)
            codes = [result.error and result.error.code async for result in run.results()]
            assert codes == ["job_lost"] * 10
            run = await client.submit(iter(PROMPTS), "r2", chunk_size=2)
            connection.flushall()
            with pytest.raises(RunNotFoundError):
                await run.wait()

    asyncio.run(main())


def test_calls_survive_a_redis_that_lost_everything(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            calls = [asyncio.create_task(client.generate(f"{i}")) for i in range(10)]
            await asyncio.to_thread(until, lambda: len(rq_queue(connection)) == 10)
            answerer.answer(jobs=4)
            connection.flushall()
            async with answerer.answering():
                got = await asyncio.gather(*calls)
            assert [result.text for result in got] == [f"answer to {i}" for i in range(10)]

    asyncio.run(main())


def on_disk(connection: redis.Redis) -> bool:
    return not connection.info("persistence")["aof_rewrite_in_progress"]


class _StockWorker(SimpleWorker):
    def _install_signal_handlers(self) -> None:
        """Not possible outside the main thread."""


def _work_like_stock_rq(connection: redis.Redis) -> None:
    queue = rq_queue(connection)
    _StockWorker([queue], connection=connection, serializer="json").work(
        burst=True, logging_level="CRITICAL"
    )
    assert queue.failed_job_registry.get_job_ids() == ["r-0"]


def test_cancel_ends_what_is_open_and_empties_the_queue(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            run = await client.submit(PROMPTS, "r", chunk_size=2)
            answerer.answer(jobs=2)
            assert await run.cancel() == 6
            assert await run.cancel() == 0
            status = await run.wait()
            assert status.finish_reasons == {"stop": 4, "cancelled": 6}
            got = await all_results(client, "r")
            assert [got[i].id for i in range(10)] == [str(i) for i in range(10)]

    asyncio.run(main())
    assert rq_queue(connection).job_ids == []
    assert rq_job(connection, "r-4").get_status() is JobStatus.CANCELED


def test_cancelled_in_bulk_jobs_are_to_rq_as_if_it_had_done_it(
    settings: QueueSettings, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if the queue were very long: a call of the script ends after one job, or two
    monkeypatch.setattr("queue_api.store.run_store.QUEUE_ENTRIES_AT_ONCE", 12)
    queue = rq_queue(connection)

    async def main() -> None:
        async with Client(settings=settings) as client:
            run = await client.submit(PROMPTS, "r", chunk_size=2)
            await client.submit(PROMPTS, "other", chunk_size=2)
            connection.hset("rq:job:r-2", mapping={"rate_limit_key": "k"})
            rq_job(connection, "other-0").cancel()
            dependent = queue.enqueue(GENERATE, "after it", depends_on=rq_job(connection, "r-3"))
            assert await run.cancel() == 10
            assert dependent.get_status() is JobStatus.DEFERRED

    asyncio.run(main())
    ours = [f"r-{i}" for i in range(5)]
    assert queue.job_ids == [f"other-{i}" for i in range(1, 5)]
    assert sorted(queue.canceled_job_registry.get_job_ids()) == ["other-0", *ours]
    by_rq = connection.zscore("rq:canceled:batchmill", "other-0")
    for job_id in ours:
        assert rq_job(connection, job_id).get_status() is JobStatus.CANCELED
        assert 0 <= connection.zscore("rq:canceled:batchmill", job_id) - by_rq < 60
        assert 0 < connection.ttl(f"rq:job:{job_id}") <= settings.job_ttl_s
    as_rq = set(connection.hkeys("rq:job:other-0"))
    assert set(connection.hkeys("rq:job:r-0")) == as_rq


def test_one_request_can_be_cancelled_and_its_neighbours_go_on(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            rows = [{"id": f"id-{i}", "prompt": "x"} for i in range(4)]
            await client.submit(rows, "r", chunk_size=2)
            # by a process that doesn't know the ids
            async with Client(settings=settings) as other:
                assert await other.cancel("r", "id-1") == 1
                assert rq_queue(connection).job_ids == ["r-0", "r-1"]
                with pytest.raises(InvalidRequestError, match="has no request 'id-9'"):
                    await other.cancel("r", "id-9")
            answerer.answer()
            got = await all_results(client, "r")
            assert [got[i].finish_reason.value for i in range(4)] == [
                "stop",
                "cancelled",
                "stop",
                "stop",
            ]
            assert got[1].id == "id-1"
            async with Client(settings=settings) as other:
                assert await other.cancel("r", "id-1") == 0, "it has ended"
                assert await other.cancel("r", "id-3") == 0

    asyncio.run(main())


def test_a_run_cancelled_while_it_is_submitted_ends_cancelled(
    settings: QueueSettings, connection: redis.Redis
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client, Client(settings=settings) as other:

            async def prompts() -> AsyncIterator[str]:
                for i in range(2000):
                    if i == 1500:
                        assert await other.cancel("r") > 0
                    yield f"prompt {i}"

            run = await client.submit(prompts(), "r")
            status = await run.wait()
            assert status.finish_reasons == {"cancelled": 2000}

    asyncio.run(main())
    assert rq_queue(connection).job_ids == []


def test_at_the_limit_asyncio_waits_and_sync_is_told(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    limited = settings.model_copy(update={"max_queue": 2})

    async def main() -> None:
        async with Client(settings=limited) as client:
            submission = asyncio.create_task(client.submit(PROMPTS, "r", chunk_size=1))
            await asyncio.to_thread(until, lambda: connection.llen("rq:queue:batchmill") >= 2)
            assert connection.llen("rq:queue:batchmill") == 2
            assert not submission.done()
            async with answerer.answering():
                run = await submission
                assert len(await all_results(client, run.id)) == 10

    asyncio.run(main())
    with SyncClient(settings=limited) as client:
        with pytest.raises(QueueFullError, match="limit of 2 jobs"):
            client.submit(PROMPTS, "s", chunk_size=1)
        assert connection.llen("rq:queue:batchmill") == 2
        # what it has isn't made twice
        for _ in range(5):
            answerer.answer()
            try:
                run = client.submit(PROMPTS, "s", chunk_size=1)
            except QueueFullError:
                continue
        answerer.answer()
        assert sorted(result.index for result in run.results()) == list(range(10))


def test_a_wrong_parameter_is_told_before_anything_is_sent(
    settings: QueueSettings, connection: redis.Redis
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            unsayable = {"metadata": {"x": object()}}
            wrongs = [{"max_tokens": 0}, {"topk": 3}, {"messages": [{"role": "user"}]}, unsayable]
            for wrong in wrongs:
                with pytest.raises(InvalidRequestError):
                    await client.generate("x", **wrong)  # type: ignore[arg-type]
            mistyped: list[tuple[str, dict[str, Any]]] = [
                ("prompt", {"prompt": 5}),
                ("messages", {"messages": "hello"}),
                ("messages", {"messages": {"role": "user", "content": "x"}}),
                ("messages", {"messages": ["hello"]}),
                ("metadata", {"prompt": "x", "metadata": "hello"}),
                ("id", {"prompt": "x", "id": ""}),
            ]
            for field, given in mistyped:
                with pytest.raises(InvalidRequestError, match=field):
                    await client.generate(**given)
            with pytest.raises(InvalidRequestError, match="run id"):
                await client.submit(["x"], "no spaces")
            with pytest.raises(InvalidRequestError, match="into a list"):
                await client.submit("just one")

    asyncio.run(main())
    assert connection.keys("*") == []


def test_a_closed_client_says_so(settings: QueueSettings) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            pass
        with pytest.raises(RuntimeError, match="closed"):
            await client.generate("x", timeout=5)

    asyncio.run(main())
    with SyncClient(settings=settings) as sync_client:
        pass
    with pytest.raises(RuntimeError, match="client is closed"):
        sync_client.generate("x")


def test_unknown_runs_are_told_so_and_not_made(
    settings: QueueSettings, connection: redis.Redis
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            for act in (client.status, client.cancel, client.run("nope").wait):
                with pytest.raises(RunNotFoundError, match="nope"):
                    await (act("nope") if act.__name__ != "wait" else act())  # type: ignore[call-arg, operator]

    asyncio.run(main())
    assert [key for key in run_keys(connection) if "nope" in key] == []


def test_a_producer_that_stops_for_good_is_noticed(settings: QueueSettings) -> None:
    hasty = settings.model_copy(update={"producer_patience_s": 0.2})

    async def main() -> None:
        async with Client(settings=hasty) as client:
            await client.store.open("r", queue="batchmill", chunk_size=1)
            with pytest.raises(RunIncompleteError, match="its producer stopped after 0"):
                await client.run("r").wait()

    asyncio.run(main())


def test_a_client_reads_on_after_redis_was_killed_and_restarted() -> None:
    with EmbeddedRedis() as server:
        settings = QueueSettings.load(redis_url=server.url, reconcile_s=0.2, reconnect_s=20)

        async def main() -> None:
            async with Client(settings=settings) as client:
                run = await client.submit(PROMPTS, "r", chunk_size=1)
                results = run.results()
                connection = redis.Redis.from_url(server.url)
                Answerer(connection).answer(jobs=3)
                got = [await anext(results) for _ in range(3)]
                connection.execute_command("BGREWRITEAOF")  # all of it is on disk
                await asyncio.to_thread(until, lambda: on_disk(connection))
                await asyncio.to_thread(server.restart, kill=True)
                Answerer(connection).answer()
                got += [result async for result in results]
                assert sorted(result.index for result in got) == list(range(10))

        asyncio.run(main())


def test_redis_that_is_away_or_refuses_is_told_in_one_line(tmp_path: Any) -> None:
    async def use(url: str) -> None:
        async with Client(url):
            pass

    with pytest.raises(RedisUnavailableError, match=r"no Redis answers at unix:///.*REDIS_URL"):
        asyncio.run(use(f"unix://{tmp_path}/none.sock"))
    with EmbeddedRedis() as server:
        redis.Redis.from_url(server.url).config_set("requirepass", "secret")
        with pytest.raises(RedisAuthError, match="refused the user or password"):
            asyncio.run(use(server.url))


def test_a_reader_that_lags_holds_some_results_and_gets_them_all(
    settings: QueueSettings, answerer: Answerer
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            await client.submit((f"prompt {i}" for i in range(9000)), "r", chunk_size=500)
            subscription = await client.reader.subscribe("r")
            answerer.answer()
            await asyncio.to_thread(until, lambda: subscription.full)
            # another run's reader isn't kept waiting by it
            await client.submit(["x"], "s")
            answerer.answer()
            assert len(await all_results(client, "s")) == 1
            held = await subscription.take(0)
            assert MOST_UNREAD <= len(held) < 9000
            indexes = [index for _, index, _ in held]
            while len(indexes) < 9000:
                page = await subscription.take(20)
                assert page, "nothing comes any more"
                indexes += [index for _, index, _ in page]
            assert indexes == list(range(9000))

    asyncio.run(main())


def test_calls_wait_for_room_in_a_full_queue(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    limited = settings.model_copy(update={"max_queue": 3})

    async def main() -> None:
        async with Client(settings=limited) as client:
            calls = asyncio.gather(*(client.generate(f"p{i}") for i in range(10)))
            # long enough for the sweeps that mustn't take those that wait for lost
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(calls), 0.5)
            assert connection.llen("rq:queue:batchmill") == 3
            async with answerer.answering():
                got = await calls
            assert [result.text for result in got] == [f"answer to p{i}" for i in range(10)]
        async with Client(settings=limited, wait_when_full=False) as client:
            calls = asyncio.gather(
                *(client.generate(f"p{i}") for i in range(5)), return_exceptions=True
            )
            await asyncio.to_thread(until, lambda: connection.llen("rq:queue:batchmill") == 3)
            async with answerer.answering():
                told = await calls
            assert [isinstance(answer, QueueFullError) for answer in told] == [False] * 3 + [
                True
            ] * 2

    asyncio.run(main())


def test_a_result_that_redis_tells_twice_is_read_once(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            await client.submit(PROMPTS, "r", chunk_size=5)
            answerer.answer(jobs=1)
            # a server that lost its last second has computed the first again
            keys = RunKeys.of("r")
            (_, entry), *_ = connection.xrange(keys.results)
            for _ in range(9):
                connection.xadd(keys.results, entry)
            results = client.run("r").results()
            got = [(await anext(results)).index for _ in range(5)]
            answerer.answer()
            got += [result.index async for result in results]
            assert got == list(range(10))

    asyncio.run(main())
