"""The client for programs without asyncio: the same methods, waiting for their outcome."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

from queue_api.client.client import Client
from queue_api.client.run import Run
from queue_api.client.submission import Requests
from queue_api.connection.settings import QueueSettings
from queue_api.store.runs import RunStatus
from queue_api.wire.sampling_fields import SamplingFields
from queue_api.wire.schemas import ChatMessage, GenerationResult, SamplingParams

__all__ = ["SyncClient", "SyncRun"]

_T = TypeVar("_T")


class SyncClient:
    """A Client in a thread of its own; it may be used from several threads at once.

        with SyncClient() as client:
            print(client.generate("The day after Monday is", max_tokens=8).text)

    Unlike the asyncio client it doesn't wait when the queue is at its limit, unless asked to.

    :raises RedisAccessError: nothing answers, wrong password, unfit server
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        queue: str | None = None,
        settings: QueueSettings | None = None,
        wait_when_full: bool = False,
    ) -> None:
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
        self.close()

    def close(self) -> None:
        """Let go of Redis. What was submitted goes on without us."""
        if not self._loop.is_closed():
            self.call(self._client.close())
            self._stop()

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[ChatMessage | Mapping[str, Any]] | None = None,
        id: str | None = None,  # noqa: A002
        metadata: Mapping[str, Any] | None = None,
        return_token_ids: bool = False,
        timeout: float | None = None,
        **sampling: Unpack[SamplingFields],
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
                **sampling,
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
        """See Client.submit; the requests are iterated over in the client's thread."""
        return SyncRun(
            self.call(
                self._client.submit(
                    requests, run, queue=queue, chunk_size=chunk_size, defaults=defaults
                )
            ),
            self,
        )

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

        :raises RuntimeError: the client is closed
        """
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

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
            with contextlib.suppress(RuntimeError):  # the client was closed meanwhile
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
