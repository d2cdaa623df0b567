"""The client with real worker processes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import pytest
import redis
from kits.client_kit import rq_queue, run_keys
from kits.worker_kit import WorkerProcess, until

from queue_api.client.client import Client
from queue_api.client.sync_client import SyncClient
from queue_api.connection.settings import QueueSettings
from queue_api.store.keys import RunKeys
from queue_api.wire.errors import ClientClosedError, DuplicateRequestError, GenerationFailedError
from queue_api.wire.schemas import FinishReason

StartWorker = Callable[..., WorkerProcess]


def test_a_thousand_calls_wait_at_once_and_each_gets_its_own_text(
    settings: QueueSettings, connection: redis.Redis, start_worker: StartWorker
) -> None:
    start_worker("echo:tokens=2")

    async def main() -> None:
        async with Client(settings=settings) as client:
            calls = [client.generate(f"number{i}", metadata={"i": i}) for i in range(1000)]
            got = await asyncio.gather(*calls)
            assert [result.text.split()[0] for result in got] == [f"number{i}" for i in range(1000)]
            assert [result.metadata["i"] for result in got] == list(range(1000))
            assert len(run_keys(connection)) <= 4, "a run, and the stream that wakes the reader"
        assert [key for key in run_keys(connection) if "calls-" in key] == []

    asyncio.run(main())


def test_a_worker_killed_among_500_calls_costs_no_answer_and_doubles_none(
    settings: QueueSettings, connection: redis.Redis, start_worker: StartWorker
) -> None:
    slow = "echo:tokens=20,step_s=0.01,max_num_seqs=32"
    victim = start_worker(slow, lease_s=1, max_num_seqs=32)
    start_worker(slow, lease_s=1, max_num_seqs=32)

    async def main() -> None:
        async with Client(settings=settings) as client:
            calls = [asyncio.create_task(client.generate(f"number{i}")) for i in range(500)]
            answers = asyncio.as_completed(calls)
            for _ in range(100):
                await next(answers)
            victim.send(signal.SIGKILL)
            got = await asyncio.gather(*calls)
            assert [r.text for r in got] == [" ".join([f"number{i}"] * 20) for i in range(500)]
            again = [result for result in got if result.attempt > 1]
            assert again, "the victim held none"
            (run,) = {result.run for result in got}
            status = await client.status(run)
            assert (status.done, dict(status.finish_reasons)) == (500, {"length": 500})
            assert connection.bitcount(RunKeys.of(run).done) == 500

    asyncio.run(main())


def test_a_call_with_an_id_is_made_once(
    settings: QueueSettings, connection: redis.Redis, start_worker: StartWorker
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as one, Client(settings=settings) as other:
            first = asyncio.create_task(one.generate("hello", id="an id: 1"))
            second = asyncio.create_task(other.generate("hello", id="an id: 1"))
            await asyncio.to_thread(until, lambda: len(rq_queue(connection)) == 1)
            start_worker()
            results = [await first, await second, await one.generate("hello", id="an id: 1")]
            assert results[0] == results[1] == results[2]
            assert results[0].id == "an id: 1"
            with pytest.raises(DuplicateRequestError, match="another prompt"):
                await one.generate("goodbye", id="an id: 1")

    asyncio.run(main())


def test_an_id_is_no_run_and_on_another_queue_another_call(
    settings: QueueSettings, connection: redis.Redis, start_worker: StartWorker
) -> None:
    start_worker("echo:tokens=1", queues="one,batchmill")
    start_worker("echo:tokens=2", queues="two")

    async def main() -> None:
        async with (
            Client(settings=settings, queue="one") as one,
            Client(settings=settings, queue="two") as two,
        ):
            run = await one.submit(["of a run"], "same", queue="batchmill")
            assert (await one.generate("hello", id="same")).text == "hello"
            assert (await two.generate("a b", id="same")).text == "a b"
            assert [r.text async for r in run.results()] == ["of"]
            # a run may be called so, too, once the call is known
            assert [r.text async for r in (await two.submit(["x y"], "named")).results()] == ["x y"]
            assert (await two.generate("c d", id="named")).text == "c d"

    asyncio.run(main())


def test_an_abandoned_call_is_withdrawn(settings: QueueSettings, connection: redis.Redis) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            with pytest.raises(TimeoutError, match=r"no result within 0.2 s; withdrawn"):
                await client.generate("nobody answers", timeout=0.2)
            await asyncio.to_thread(until, lambda: not len(rq_queue(connection)))
            call = asyncio.create_task(client.generate("nobody answers"))
            await asyncio.to_thread(until, lambda: len(rq_queue(connection)) == 1)
            call.cancel()
            await asyncio.to_thread(until, lambda: not len(rq_queue(connection)))
            pending = asyncio.create_task(client.generate("still there at the end"))
            await asyncio.to_thread(until, lambda: len(rq_queue(connection)) == 1)
        with pytest.raises(ClientClosedError):
            await pending

    asyncio.run(main())
    assert len(rq_queue(connection)) == 0


def test_a_call_whose_job_vanished_is_sent_again(
    settings: QueueSettings, connection: redis.Redis, start_worker: StartWorker
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            call = asyncio.create_task(client.generate("hello"))
            await asyncio.to_thread(until, lambda: len(rq_queue(connection)) == 1)
            rq_queue(connection).jobs[0].delete()
            start_worker()
            assert (await call).ok

    asyncio.run(main())


def test_running_requests_are_cancelled(
    settings: QueueSettings, connection: redis.Redis, start_worker: StartWorker
) -> None:
    start_worker("echo:tokens=1000,step_s=0.05", lease_s=3)
    prompts = [f"text {i}" for i in range(4)]

    async def main() -> None:
        async with Client(settings=settings) as client:
            run = await client.submit(
                [{"prompt": text, "max_tokens": 1000} for text in prompts], chunk_size=2
            )
            registry = rq_queue(connection).started_job_registry
            await asyncio.to_thread(until, lambda: registry.count == 2)
            assert await run.cancel() == 4
            assert (await run.wait()).finish_reasons == {"cancelled": 4}
            assert registry.count == 0
            # the worker is free for others again
            assert (await client.generate("next", max_tokens=1)).ok

    asyncio.run(main())


def test_the_sync_client_does_the_same(settings: QueueSettings, start_worker: StartWorker) -> None:
    start_worker()
    with SyncClient(settings=settings) as client:
        assert client.generate("hello there", max_tokens=1).text == "hello"
        run = client.submit([{"id": "a", "prompt": "x"}, {"id": "b", "prompt": ""}], "r")
        by_id = {result.id: result for result in client.run(run.id).results()}
        assert by_id["a"].raise_for_error().finish_reason is not FinishReason.ERROR
        with pytest.raises(GenerationFailedError, match="'prompt' is empty"):
            by_id["b"].raise_for_error()
        assert run.wait().done == client.status("r").done == 2
        assert client.cancel("r") == 0
        results = run.results()
        next(results)
        results.close()  # leaving early is fine
