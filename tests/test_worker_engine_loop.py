"""When the event loop hears of what the engine's thread completed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from queue_api.wire.schemas import GenerationRequest
from workers.running.echo_engine import EchoEngine
from workers.running.engine_loop import Addition, Completion, EngineLoop

PROMPT = "a b c d"


def addition(max_tokens: int) -> Addition:
    key = str(max_tokens)
    request = GenerationRequest(id=key, prompt=PROMPT, sampling={"max_tokens": max_tokens})
    return Addition(key, request, key)


class FailsAtStep(EchoEngine):
    def __init__(self, step: int) -> None:
        super().__init__(tokens=100)
        self._left = step

    def step(self) -> list:
        self._left -= 1
        if not self._left:
            raise RuntimeError("the engine failed")
        return super().step()


async def told_until(engine: EchoEngine, additions: Sequence[Addition], last: str) -> list[str]:
    """Keys in the order told; `last` is one of them or "crash"."""
    told: list[str] = []
    is_over = asyncio.Event()

    def tell(*keys: str) -> None:
        told.extend(keys)
        if last in told:
            is_over.set()

    def on_done(completions: Sequence[Completion]) -> None:
        tell(*(completion.key for completion in completions))

    loop = EngineLoop(engine)
    loop.start(on_done, lambda _: None, lambda _: tell("crash"), steps_between=1000)
    loop.add(additions)
    async with asyncio.timeout(20):
        await is_over.wait()
    await loop.stop()
    return told


@pytest.fixture
def an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.running.engine_loop.HAND_OVER_S", 3600)


@pytest.mark.usefixtures("an_hour")
def test_what_is_left_is_told_when_the_engine_runs_empty() -> None:
    told = asyncio.run(told_until(EchoEngine(tokens=100), [addition(n) for n in (1, 2, 3)], "3"))
    assert told == ["1", "2", "3"]


@pytest.mark.usefixtures("an_hour")
def test_what_was_completed_before_the_engine_failed_is_told_first() -> None:
    additions = [addition(n) for n in (1, 2, 3, 9)]
    assert asyncio.run(told_until(FailsAtStep(4), additions, "crash")) == ["1", "2", "3", "crash"]


def test_while_the_engine_goes_on_completions_are_told_all_the_same() -> None:
    engine = EchoEngine(tokens=10**9, step_s=0.001)
    additions = [addition(n) for n in (1, 2, 3, 10**9)]
    assert asyncio.run(told_until(engine, additions, "3")) == ["1", "2", "3"]


@pytest.mark.usefixtures("an_hour")
def test_an_engine_with_places_left_is_told_of_at_once() -> None:
    """Else it would run short of work until somebody looks."""
    engine = EchoEngine(tokens=10**9, step_s=0.02, max_num_seqs=8)
    additions = [addition(n) for n in (1, 2, 9, 10**9)]
    assert asyncio.run(told_until(engine, additions, "9")) == ["1", "2", "9"]
