"""The engine in a thread of its own, so that asyncio never waits for torch.

Commands (add, cancel) go in through a queue and are applied between two steps. What is completed
comes out in calls on the event loop: at once if the engine has nothing more to do or was quiet
before, soon if it has places for more, else with what the next steps complete, for waking the loop
costs more than a result.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

from queue_api.wire.errors import EngineError
from queue_api.wire.schemas import (
    FinishReason,
    GenerationRequest,
    StructuredOutputStatus,
    TokenLogprobs,
)

__all__ = ["Addition", "Completion", "Engine", "EngineLoop", "Refusal"]

logger = logging.getLogger(__name__)

HAND_OVER_S, HAND_OVER_SOON_S = 0.25, 0.03
"""From one call with completions to the next while the engine has more to do than places for it.
The shorter one while it has places, so that it is given more, and while `is_hasty`."""


class Completion(Protocol):
    """How a request ended, as the engine tells it. Times are `time.perf_counter` seconds."""

    key: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    error: BaseException | None
    logprobs: list[TokenLogprobs] | None
    added_at: float | None
    admitted_at: float | None
    first_token_at: float | None
    finished_at: float | None
    stage_s: list[float]
    structured_output: StructuredOutputStatus | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    applied_defaults: tuple[str, ...]

    @property
    def samples(self) -> Sequence[Completion]:
        """All samples where the request asks for several."""
        ...


class Engine(Protocol):
    """What a worker needs of an engine; `engine.engine.Engine` is the real one."""

    model_name: str
    model_revision: str | None

    def add(
        self,
        key: str,
        request: GenerationRequest,
        *,
        generated: Sequence[int] = (),
        seed_key: str | None = None,
    ) -> None: ...
    def cancel(self, key: str) -> bool: ...
    def step(self) -> Sequence[Completion]: ...
    def has_unfinished(self) -> bool: ...

    def num_free_seqs(self) -> int:
        """How many more requests could run at once."""
        ...

    def progress(self) -> Mapping[str, Sequence[int]]:
        """New tokens so far of what is running; copies, for they go to another thread."""
        ...

    def describe_work(self) -> str:
        """What it has done so far, in a line for the log."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Refusal:
    """The Completion of a request that the engine didn't take."""

    key: str
    error: BaseException | None
    logprobs: list[TokenLogprobs] | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.ERROR
    prompt_tokens: int = 0
    completion_tokens: int = 0
    added_at: float | None = None
    admitted_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = field(default_factory=time.perf_counter)
    stage_s: list[float] = field(default_factory=list)
    structured_output: StructuredOutputStatus | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    applied_defaults: tuple[str, ...] = ()
    samples: Sequence[Completion] = ()


class Addition(NamedTuple):
    """What `Engine.add` takes."""

    key: str
    request: GenerationRequest
    seed_key: str
    generated: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class _Add:
    additions: Sequence[Addition]


@dataclass(frozen=True, slots=True)
class _Cancel:
    key: str


@dataclass(frozen=True, slots=True)
class _Progress:
    reply: asyncio.Future[Mapping[str, Sequence[int]]]


class _Stop:
    pass


def _answer(
    reply: asyncio.Future[Mapping[str, Sequence[int]]], progress: Mapping[str, Sequence[int]]
) -> None:
    if not reply.done():  # whoever asked may have given up, as in a drain amid a long step
        reply.set_result(progress)


class EngineLoop:
    """Runs `engine` from `start` to `stop`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: SimpleQueue[_Add | _Cancel | _Progress | _Stop] = SimpleQueue()
        self._completed: deque[Completion] = deque()
        """What the event loop hasn't heard of yet; filled by the thread, emptied by the loop."""
        self._will_look = False
        """The event loop comes for completions by itself."""
        self._timer: asyncio.TimerHandle | None = None
        self._handed_over_at = float("-inf")
        self.is_hasty = False
        """Somebody may wait for a single completion: tell of them sooner."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(
        self,
        on_done: Callable[[Sequence[Completion]], None],
        on_progress: Callable[[Mapping[str, Sequence[int]]], None],
        on_crash: Callable[[BaseException], None],
        *,
        steps_between: int,
    ) -> None:
        """Start the thread; the callbacks run on the event loop that is running now.

        After `on_crash` no request is worked on any more: the engine can't be trusted.

        :param steps_between: calls of `on_progress`, with the tokens so far of what is running
        """
        self._on_done = on_done
        self._on_progress = on_progress
        self._on_crash = on_crash
        self._steps_between = steps_between
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._thread.start()

    def add(self, additions: Sequence[Addition]) -> None:
        """Begin these requests; together, so that the thread is woken once."""
        self._commands.put(_Add(additions))

    def cancel(self, key: str) -> None:
        """Drop a request; it isn't reported as done unless it was done before."""
        self._commands.put(_Cancel(key))

    async def progress(self) -> Mapping[str, Sequence[int]]:
        """The tokens so far of what is running."""
        assert self._loop is not None
        reply: asyncio.Future[Mapping[str, Sequence[int]]] = self._loop.create_future()
        self._commands.put(_Progress(reply))
        return await reply

    async def stop(self) -> None:
        """Let the step that is running end, then close the engine."""
        self._commands.put(_Stop())
        await self._ended.wait()

    def _run(self) -> None:
        steps = 0
        try:
            while self._apply_commands():
                if not self.engine.has_unfinished():
                    continue
                self._completed.extend(self.engine.step())
                if self._completed and self._is_due():
                    self._report(self._hand_over)
                steps += 1
                if steps % self._steps_between == 0:
                    self._report(self._on_progress, self.engine.progress())
        except BaseException as error:
            logger.critical("engine failed: %s", error, exc_info=True)
            self._report(self._hand_over)
            self._report(self._on_crash, error)
        finally:
            self._close()

    def _is_due(self) -> bool:
        """Whether the event loop is to hear of completions before it comes for them by itself."""
        if not self._will_look or not self.engine.has_unfinished():
            return True
        is_long_ago = time.monotonic() > self._handed_over_at + HAND_OVER_SOON_S
        return is_long_ago and self.engine.num_free_seqs() > 0

    def _apply_commands(self) -> bool:
        """Apply all that waits, or wait for something if the engine is idle; False to stop."""
        wait = not self.engine.has_unfinished()
        while True:
            try:
                command = self._commands.get(block=wait)
            except Empty:
                break
            if isinstance(command, _Stop):
                return False
            if isinstance(command, _Cancel):
                self.engine.cancel(command.key)
            elif isinstance(command, _Progress):
                self._report(_answer, command.reply, self.engine.progress())
            else:
                refused = [r for r in map(self._add, command.additions) if r is not None]
                if refused:
                    self._completed.extend(refused)
                    self._report(self._hand_over)
            wait = False
        return True

    def _add(self, addition: Addition) -> Refusal | None:
        key, request, seed_key, generated = addition
        try:
            self.engine.add(key, request, generated=generated, seed_key=seed_key)
        except EngineError:
            raise
        except Exception as error:  # such as a chat template that chokes: this request's alone
            if generated:
                # a partial text that this engine can't take is no fault of the request
                logger.warning("%s begins anew: its partial text is refused: %s", key, error)
                return self._add(Addition(key, request, seed_key))
            return Refusal(key, error)
        return None

    def _hand_over(self) -> None:
        """On the event loop: tell of what was completed, and look for more in a while."""
        if self._timer is not None:
            self._timer.cancel()
        assert self._loop is not None
        self._will_look = True
        self._handed_over_at = time.monotonic()
        pause_s = HAND_OVER_SOON_S if self.is_hasty else HAND_OVER_S
        self._timer = self._loop.call_later(pause_s, self._look_again)
        if done := [self._completed.popleft() for _ in range(len(self._completed))]:
            self._on_done(done)

    def _look_again(self) -> None:
        # in this order: what the thread adds from here on is seen here, or reported by it
        self._will_look = False
        if self._completed:
            self._hand_over()

    def _report(self, callback: Callable[..., object], *values: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *values)
        except RuntimeError:  # the event loop is closed: the worker is gone already
            logger.debug("nobody left to hear from the engine")

    def _close(self) -> None:
        try:
            logger.info("engine closes after %s", self.engine.describe_work())
            self.engine.close()
        except Exception:
            logger.exception("engine didn't close cleanly")
        self._report(self._hand_over)
        self._report(self._ended.set)
