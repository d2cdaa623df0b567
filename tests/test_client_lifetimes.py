"""A run's keys live and lapse together, and what is missing of it is said, not passed over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import redis
from kits.client_kit import Answerer, rq_queue

from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.store.keys import RunKeys
from queue_api.wire.errors import RunIncompleteError, RunNotFoundError

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
            got = []
            with pytest.raises(RunIncompleteError, match="of its 10 results aren't on its stream"):
                async with answerer.answering():
                    async for result in client.run("r").results():
                        got.append(result.index)
            assert 0 < len(got) < 10
            assert (await run.wait()).complete

    asyncio.run(main())
