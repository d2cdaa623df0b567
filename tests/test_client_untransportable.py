"""What can't be written as JSON, or couldn't be read again, is the fault of its request alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from kits.client_kit import Answerer, rq_queue

from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.wire.errors import InvalidRequestError
from queue_api.wire.schemas import GenerationRequest, GenerationResult, SamplingParams

HALF = "\ud83d"
WRONG: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": HALF}]},
    {"messages": [{"role": HALF, "content": "x"}]},
    {"prompt": HALF},
    {"prompt": "x", "stop": [HALF]},
    {"prompt": "x", "structured_outputs": {"choice": [HALF]}},
    {"prompt": "x", "structured_outputs": {"json": {"const": HALF}}},
    {"prompt": "x", "metadata": {"note": HALF}},
    {"prompt": "x", "metadata": {HALF: 1}},
    {"prompt": "x", "metadata": {"x": float("nan")}},
    {"prompt": "x", "metadata": {"x": [float("-inf")]}},
    {"prompt": "x", "id": HALF},
]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize("fields", WRONG, ids=[ascii(fields)[:60] for fields in WRONG])
def test_a_call_that_cannot_travel_fails_alone(
    settings: QueueSettings, answerer: Answerer, fields: dict[str, Any]
) -> None:
    async def main() -> None:
        async with Client(settings=settings) as client, answerer.answering():
            calls = [client.generate(f"good {n}") for n in range(5)]
            bad, *good = await asyncio.gather(
                client.generate(**fields, timeout=20), *calls, return_exceptions=True
            )
            assert isinstance(bad, InvalidRequestError), bad
            texts = [result.text for result in good if isinstance(result, GenerationResult)]
            assert texts == [f"answer to good {n}" for n in range(5)]

    asyncio.run(main())


def test_requests_of_a_run_that_cannot_travel_end_as_errors(
    settings: QueueSettings, answerer: Answerer
) -> None:
    cut = {"structured_outputs": {"json": {"const": HALF}}}
    built = GenerationRequest(id="built", prompt="x", sampling=cut)
    ended = GenerationResult.failed("ended", InvalidRequestError("x"), metadata={"x": HALF})

    async def main() -> list[GenerationResult]:
        async with Client(settings=settings) as client:
            run = await client.submit([*WRONG, built, ended, "fine"])
            answerer.answer()
            return [result async for result in run.results()]

    results = sorted(asyncio.run(main()), key=lambda result: result.index)
    assert [result.ok for result in results] == [False] * (len(WRONG) + 2) + [True]
    said = [result.error.message for result in results if result.error is not None]
    assert "'messages[0].content' is '\\ud83d': holds half a surrogate pair" in said[0]
    assert "can't be written as JSON: half a surrogate pair" in said[len(WRONG)]


@pytest.mark.parametrize("depth", [100, 149, 150, 190, 200, 254, 260])
def test_metadata_comes_back_or_is_refused(
    settings: QueueSettings, answerer: Answerer, depth: int
) -> None:
    async def main() -> GenerationResult | None:
        async with Client(settings=settings) as client, answerer.answering():
            try:
                return await client.generate("x", metadata={"x": nested(depth)}, timeout=20)
            except InvalidRequestError:
                return None

    result = asyncio.run(main())
    assert (result is None) == (depth >= 150)
    assert result is None or result.metadata == {"x": nested(depth)}


def test_brackets_within_texts_are_no_depth() -> None:
    text = '["' * 500 + "\\" * 3
    assert GenerationRequest(id="a", prompt="x", metadata={"x": text}).metadata == {"x": text}


def test_a_default_id_gives_way_to_an_own_one(settings: QueueSettings, answerer: Answerer) -> None:
    requests = [{"id": "1", "prompt": "own"}, "default", "two"]

    async def main() -> list[GenerationResult]:
        async with Client(settings=settings) as client:
            run = await client.submit(requests)
            answerer.answer()
            return [result async for result in run.results()]

    results = sorted(asyncio.run(main()), key=lambda result: result.index)
    texts = [result.text for result in results]
    assert texts == ["answer to own", "answer to default", "answer to two"]
    assert [result.id for result in results] == ["1", "row-1", "2"]


def test_defaults_fill_what_a_sampling_object_leaves_out(
    settings: QueueSettings, answerer: Answerer
) -> None:
    given = [{"top_k": 4}, {}, SamplingParams(max_tokens=2), {"max_new_tokens": 3}]

    async def main() -> None:
        async with Client(settings=settings) as client:
            requests = [{"prompt": "x", "sampling": sampling} for sampling in given]
            await client.submit(requests, defaults=SamplingParams(max_tokens=7, seed=1))

    asyncio.run(main())
    (job,) = rq_queue(answerer.connection).jobs
    assert [request["sampling"] for _, request in job.kwargs["requests"]] == [
        {"max_tokens": 7, "top_k": 4, "seed": 1},
        {"max_tokens": 7, "seed": 1},
        {"max_tokens": 2, "seed": 1},
        {"max_tokens": 3, "seed": 1},
    ]
