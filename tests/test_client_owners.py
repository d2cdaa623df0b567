"""Whose a client is: processes, threads and event loops that it can't serve are told so at once."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import redis
from kits.client_kit import Answerer, rq_queue
from kits.worker_kit import PATIENCE_S, until

from queue_api.client.client import Client
from queue_api.client.reader import ResultReader
from queue_api.client.sync_client import SyncClient
from queue_api.connection.embedded import EmbeddedRedis
from queue_api.connection.settings import QueueSettings
from queue_api.connection.tasks import end
from queue_api.store.keys import RunKeys
from queue_api.store.runs import run_of_call
from queue_api.wire.errors import BatchmillError, ClientClosedError

PROMPTS = [f"prompt {i}" for i in range(5)]


def in_thread(act: Callable[[], Any]) -> Future[Any]:
    """Do it in a thread that doesn't keep the process from ending."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(act())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def in_child(act: Callable[[], object]) -> str:
    """What it raises in a forked child: the class's name, `hangs`, or nothing."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = ""
        signal.alarm(10)  # ends a child that hangs
        try:
            act()
        except BaseException as error:
            said = ",".join(kind.__name__ for kind in type(error).__mro__)
        os.write(write, f"{said}.".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said.removesuffix(".") if said else "hangs"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_and_its_parent_goes_on(
    settings: QueueSettings, answerer: Answerer
) -> None:
    with SyncClient(settings=settings) as client:
        run = client.submit(PROMPTS, "r")
        answerer.answer()
        results = run.results()
        next(results)
        acts: dict[str, Callable[[], object]] = {
            "generate": lambda: client.generate("x", timeout=1),
            "generate with an id": lambda: client.generate("x", id="own", timeout=1),
            "submit": lambda: client.submit(["x"]),
            "submit an iterator": lambda: client.submit(iter([])),
            "status": lambda: client.status("r"),
            "cancel": lambda: client.cancel("r"),
            "results": lambda: list(run.results()),
            "more results": lambda: list(results),
            "wait": run.wait,
            "close": client.close,
        }
        told = {name: in_child(act) for name, act in acts.items()}
        # the first page is here already, in the child's copy as well
        assert told.pop("more results") in {"", told["results"]}
        assert all("RuntimeError" in said for said in told.values()), told
        assert len(list(results)) == 4
        assert client.status("r").complete


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_may_leave_the_block_and_make_its_own(settings: QueueSettings) -> None:
    with SyncClient(settings=settings) as client:
        client.submit(PROMPTS, "r")

        def child() -> None:
            client.__exit__(None, None, None)
            with SyncClient(settings=settings) as own:
                assert own.status("r").total == 5

        assert in_child(child) == ""


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_asyncio_client_is_its_process_alone(settings: QueueSettings) -> None:
    unused = Client(settings=settings)

    async def use(client: Client) -> None:
        await client.submit(PROMPTS, "r")
        assert (await client.status("r")).total == 5

    async def main() -> str:
        async with Client(settings=settings) as client:
            await use(client)
            return in_child(lambda: asyncio.run(use(client)))

    # a child of a program whose loop runs can't run its own: that is asyncio's word
    assert "RuntimeError" in asyncio.run(main())
    # what wasn't used before the fork is whose it is used by first
    assert in_child(lambda: asyncio.run(use(unused))) == ""
    asyncio.run(use(unused))
    assert "RuntimeError" in in_child(lambda: asyncio.run(use(unused)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_embedded_server_outlives_a_child_that_leaves_its_block() -> None:
    with EmbeddedRedis() as server:
        assert in_child(lambda: server.__exit__(None, None, None)) == ""
        assert redis.Redis.from_url(server.url).ping()


def test_a_generator_may_use_the_client_it_is_given_to(
    settings: QueueSettings, answerer: Answerer
) -> None:
    with SyncClient(settings=settings) as client:
        first = client.submit(PROMPTS, "first")
        answerer.answer()

        def chained() -> int:
            second = client.submit({"prompt": f"More of {r.text}"} for r in first.results())
            answerer.answer()
            third = client.submit(
                [f"{r.index} {client.status(second.id).total}" for r in second.results()]
            )
            answerer.answer()
            return len(list(third.results()))

        assert in_thread(chained).result(PATIENCE_S) == 5


def test_a_slow_generator_keeps_nobody_waiting_and_runs_in_its_callers_thread(
    settings: QueueSettings, answerer: Answerer
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    threads = set()

    def slow() -> Iterator[str]:
        threads.add(threading.current_thread())
        yield "one"
        begun.set()
        go_on.wait(PATIENCE_S)
        yield "two"

    with SyncClient(settings=settings) as client:
        slowly = in_thread(lambda: client.submit(slow(), "slow"))
        assert begun.wait(PATIENCE_S)
        assert client.submit(PROMPTS, "other").id == "other"
        answerer.answer()
        assert len(list(client.run("other").results())) == 5
        assert not slowly.done()
        go_on.set()
        assert slowly.result(PATIENCE_S).status().total == 2
        assert client._thread not in threads


def test_an_interrupt_in_a_generator_ends_the_block_at_once(settings: QueueSettings) -> None:
    taken = []

    def interrupted() -> Iterator[str]:
        for i in range(1000):
            taken.append(i)
            if i == 40:
                raise KeyboardInterrupt
            yield f"prompt {i}"

    with pytest.raises(KeyboardInterrupt), SyncClient(settings=settings) as client:
        client.submit(interrupted(), "r")
    assert taken[-1] == 40


async def closed_client(settings: QueueSettings) -> Client:
    client = Client(settings=settings)
    await client.submit(PROMPTS, "r")
    await client.close()
    return client


def test_a_closed_client_does_nothing_more(
    settings: QueueSettings, connection: redis.Redis
) -> None:
    async def main() -> None:
        client = await closed_client(settings)
        before = sorted(connection.keys("*"))
        run = client.run("r")
        acts: list[Callable[[], Any]] = [
            lambda: client.generate("x", timeout=5),
            lambda: client.generate("x", id="own", timeout=5),
            lambda: client.submit(["x"], "s"),
            lambda: client.status("r"),
            lambda: client.cancel("r"),
            run.wait,
            run.status,
            lambda: anext(run.results()),
            lambda: anext(run.batches(follow=False)),
            client.__aenter__,
        ]
        for act in acts:
            with pytest.raises(ClientClosedError):
                await act()
        await client.close()
        assert sorted(connection.keys("*")) == before

    asyncio.run(main())
    with SyncClient(settings=settings) as client:
        run = client.run("r")
    client.close()
    taken: list[str] = []
    acts: list[Callable[[], Any]] = [
        lambda: client.generate("x"),
        lambda: client.generate("x", id="own"),
        lambda: client.submit(taken.append(p) or p for p in PROMPTS),
        lambda: client.status("r"),
        lambda: list(run.results()),
        run.wait,
    ]
    for act in acts:
        with pytest.raises(RuntimeError, match="client is closed"):
            act()
    assert not taken


def test_close_tells_all_who_wait(settings: QueueSettings, connection: redis.Redis) -> None:
    async def main() -> list[BaseException]:
        client = Client(settings=settings)
        run = await client.submit(PROMPTS, "r")
        waiting = [
            asyncio.create_task(client.generate("x")),
            asyncio.create_task(client.generate("x", id="own")),
            asyncio.create_task(run.wait()),
            asyncio.ensure_future(anext(run.results())),
        ]
        await asyncio.to_thread(until, lambda: len(rq_queue(connection)) == 3)
        await client.close()
        done, _ = await asyncio.wait(waiting, timeout=PATIENCE_S)
        assert len(done) == len(waiting)
        return [task.exception() for task in waiting]  # type: ignore[misc]

    told = asyncio.run(main())
    assert [type(error) for error in told] == [ClientClosedError] * 4
    # what nobody waits for any more is taken back; what has a name goes on
    own = run_of_call(settings.queue, "own")
    assert sorted(rq_queue(connection).job_ids) == [f"{own}-0", "r-0"]


def test_close_tells_the_other_threads(settings: QueueSettings, connection: redis.Redis) -> None:
    client = SyncClient(settings=settings)
    run = client.submit(PROMPTS, "r")
    blocked = threading.Event()

    def full() -> Iterator[str]:
        yield from PROMPTS
        blocked.set()
        # until the queue has room: it never has
        yield from (f"{i}" for i in range(2000))

    limited = SyncClient(settings=settings.model_copy(update={"max_queue": 1}), wait_when_full=True)
    waiting = [
        in_thread(lambda: list(run.results())),
        in_thread(run.wait),
        in_thread(lambda: client.generate("x")),
    ]
    submitting = in_thread(lambda: limited.submit(full(), "s"))
    assert blocked.wait(PATIENCE_S)
    until(lambda: len(rq_queue(connection)) == 2)
    client.close()
    limited.close()
    for outcome in [*waiting, submitting]:
        assert isinstance(outcome.exception(PATIENCE_S), ClientClosedError)
    assert not client._thread.is_alive()


def test_another_event_loop_is_told(settings: QueueSettings, answerer: Answerer) -> None:
    client = Client(settings=settings)
    first = asyncio.Runner()
    submitted = first.run(client.submit(PROMPTS, "r"))
    answerer.answer()
    acts: list[Callable[[], Any]] = [
        lambda: client.generate("x", timeout=5),
        lambda: client.generate("x", id="own", timeout=5),
        lambda: client.submit(["x"]),
        lambda: client.status("r"),
        submitted.wait,
        lambda: anext(submitted.results()),
        client.__aenter__,
    ]

    def told(more: Callable[[], Any]) -> str:
        async def main() -> None:
            await more()

        with pytest.raises(RuntimeError) as caught:
            asyncio.run(main())
        assert isinstance(caught.value, BatchmillError)
        return str(caught.value)

    for act in acts:
        assert "still open" in told(act)
    assert "still open" in told(client.close)
    first.run(submitted.wait())
    first.close()
    for act in acts:
        assert "closed by now" in told(act)
    asyncio.run(client.close())
    assert "client is closed" in told(acts[0])


@pytest.mark.parametrize("is_cancelled", [True, False], ids=["cancelled", "odd error"])
def test_what_ends_the_reader_is_told_and_the_next_call_has_another(
    settings: QueueSettings,
    answerer: Answerer,
    connection: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    is_cancelled: bool,
) -> None:
    # such as a fault of a library's: nothing that Redis says
    async def odd(_: ResultReader) -> None:
        raise ZeroDivisionError("odd")

    async def main() -> None:
        async with Client(settings=settings) as client:
            run = await client.submit(PROMPTS, "r")
            waiting = [
                asyncio.create_task(client.generate("x")),
                asyncio.create_task(run.wait()),
            ]
            await asyncio.to_thread(until, lambda: len(rq_queue(connection)) == 2)
            if is_cancelled:
                assert client.reader._task is not None
                await end([client.reader._task])  # once isn't enough: redis-py may swallow it
            else:
                monkeypatch.setattr(ResultReader, "_read_once", odd)
                await client.reader.wake()
            for task in waiting:
                with pytest.raises(ClientClosedError if is_cancelled else ZeroDivisionError):
                    await asyncio.wait_for(task, PATIENCE_S)
            monkeypatch.undo()
            async with answerer.answering():
                assert (await client.generate("y", timeout=PATIENCE_S)).text == "answer to y"
                assert len([r async for r in run.results()]) == 5

    asyncio.run(main())


def test_one_runs_unreadable_stream_is_its_readers_trouble_alone(
    settings: QueueSettings, answerer: Answerer, connection: redis.Redis
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client:
            await client.submit(PROMPTS, "r")
            await client.submit(PROMPTS, "s")
            subscription = await client.reader.subscribe("r")
            other = asyncio.create_task(client.run("s").wait())
            connection.xadd(RunKeys.of("r").results, {"-1": "x", "x": "y", str(10**30): "z"})
            answerer.answer()
            assert (await asyncio.wait_for(other, PATIENCE_S)).complete
            subscription.close()

    asyncio.run(main())
