"""The client for programs without asyncio: the same methods, waiting for their outcome."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, TypeVar, Unpack

from queue_api.client.client import Client
from queue_api.client.run import Run
from queue_api.client.submission import Requests, several
from queue_api.connection.settings import QueueSettings
from queue_api.connection.tasks import end
from queue_api.store.owner import check_process
from queue_api.store.runs import RunStatus
from queue_api.wire.errors import ClientClosedError
from queue_api.wire.request_fields import RequestFields
from queue_api.wire.schemas import ChatMessage, GenerationResult, SamplingParams

__all__ = ["SyncClient", "SyncRun"]

_T = TypeVar("_T")


class SyncClient:
    """A Client in a thread of its own; it may be used from several threads at once.

        with SyncClient() as client:
            print(client.generate("The day after Monday is", max_tokens=8).text)

    Unlike the asyncio client it doesn't wait when the queue is at its limit, unless asked to. It
    belongs to the process that made it: after a fork, make another one in the child.

    :raises RedisAccessError: nothing answers, wrong password, unfit server
    :raises WrongOwnerError: at any use in another process; a RuntimeError
    :raises ClientClosedError: at any use after `close`, and of what waits then; a RuntimeError
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        queue: str | None = None,
        settings: QueueSettings | None = None,
        wait_when_full: bool = False,
    ) -> None:
        self._pid = os.getpid()
        self._is_closed = False
        self._closing = threading.Lock()
        """Held to look at `_is_closed` and act on it: no work may come to a loop that ended."""
        self._loop = asyncio.new_event_loop()
        # daemon: a program that forgets to close its client can still end
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="batchmill client", daemon=True
        )
        self._thread.start()
        try:
            self._client = self.call(_make(url, queue, settings, wait_when_full))
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> SyncClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if (
            self._pid == os.getpid()
        ):  # else a forked child leaves the block: nothing here is its own
            self.close()

    def close(self) -> None:
        """Let go of Redis. What was submitted goes on without us.

        Whatever other threads wait for ends with a ClientClosedError.

        :raises WrongOwnerError: in another process than the one that made it
        """
        check_process(self._pid)
        with self._closing:
            is_first, self._is_closed = not self._is_closed, True
        if is_first:
            try:
                asyncio.run_coroutine_threadsafe(_end(self._client), self._loop).result()
            finally:
                self._stop()
        else:
            self._thread.join()

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[ChatMessage | Mapping[str, Any]] | None = None,
        id: str | None = None,  # noqa: A002
        metadata: Mapping[str, Any] | None = None,
        return_token_ids: bool = False,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> GenerationResult:
        """See Client.generate."""
        return self.call(
            self._client.generate(
                prompt,
                messages=messages,
                id=id,
                metadata=metadata,
                return_token_ids=return_token_ids,
                timeout=timeout,
                **fields,
            )
        )

    def submit(
        self,
        requests: Requests,
        run: str | None = None,
        *,
        queue: str | None = None,
        chunk_size: int | None = None,
        defaults: SamplingParams | None = None,
    ) -> SyncRun:
        """See Client.submit. The requests are iterated over here, in the caller's thread, so they
        may use this client; only an asynchronous iterable is in the client's.
        """
        if isinstance(requests, AsyncIterable):
            whole = self._client.submit(
                requests, run, queue=queue, chunk_size=chunk_size, defaults=defaults
            )
            return SyncRun(self.call(whole), self)
        self._check()
        submission = self._client.submission(
            run, queue=queue, chunk_size=chunk_size, defaults=defaults
        )
        for given in several(requests):
            if submission.take(given):
                self.call(submission.send())
        self.call(submission.end())
        return SyncRun(self._client.submitted(submission, requests), self)

    def run(self, run_id: str) -> SyncRun:
        """See Client.run."""
        return SyncRun(self._client.run(run_id), self)

    def status(self, run_id: str) -> RunStatus:
        """See Client.status."""
        return self.call(self._client.status(run_id))

    def cancel(self, run_id: str, request_id: str | None = None) -> int:
        """See Client.cancel."""
        return self.call(self._client.cancel(run_id, request_id))

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the client's thread; Ctrl-C here cancels it there.

        :raises ClientClosedError: the client is closed, now or while this waits
        :raises WrongOwnerError: in another process than the one that made it
        """
        try:
            self._check()
            with self._closing:
                self._check()
                future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except BaseException:
            work.close()
            raise
        try:
            return future.result()
        except CancelledError:
            raise ClientClosedError("the client was closed while this waited") from None
        except BaseException:
            future.cancel()
            raise

    def _check(self) -> None:
        check_process(self._pid)
        if self._is_closed:
            raise ClientClosedError("the client is closed; make another one")
        if threading.current_thread() is self._thread:
            # such as a garbage collector's run there: waiting would be for ourselves
            raise RuntimeError("a SyncClient can't be used in the thread that serves it")

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class SyncRun:
    """A Run whose methods wait for their outcome."""

    def __init__(self, run: Run, client: SyncClient) -> None:
        self._run = run
        self._client = client

    @property
    def id(self) -> str:
        return self._run.id

    def __repr__(self) -> str:
        return f"SyncRun({self.id!r})"

    def results(self) -> Iterator[GenerationResult]:
        """See Run.results."""
        batches = self._run.batches()
        try:
            while (batch := self._client.call(_next(batches))) is not None:
                yield from batch
        finally:
            # the client was closed meanwhile, or this is a child that has a copy of us
            with contextlib.suppress(RuntimeError):
                self._client.call(_close(batches))

    def wait(self) -> RunStatus:
        """See Run.wait."""
        return self._client.call(self._run.wait())

    def status(self) -> RunStatus:
        """See Run.status."""
        return self._client.call(self._run.status())

    def cancel(self, request_id: str | None = None) -> int:
        """See Run.cancel."""
        return self._client.call(self._run.cancel(request_id))


async def _make(
    url: str | None, queue: str | None, settings: QueueSettings | None, wait_when_full: bool
) -> Client:
    client = Client(url, queue=queue, settings=settings, wait_when_full=wait_when_full)
    return await client.__aenter__()


async def _next(batches: AsyncGenerator[_T, None]) -> _T | None:
    return await anext(batches, None)


async def _close(batches: AsyncGenerator[Any, None]) -> None:
    await batches.aclose()


async def _end(client: Client) -> None:
    """Close the client, then whatever its loop still does for other threads."""
    try:
        await client.close()
    finally:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await end(others)
