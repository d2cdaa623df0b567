"""The asyncio client: prompts in, results out, through Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Unpack
from uuid import uuid4

from queue_api.client.calls import Interactive
from queue_api.client.reader import ResultReader
from queue_api.client.run import Run
from queue_api.client.submission import Requests, Submission, as_request, fingerprint
from queue_api.connection.settings import QueueSettings
from queue_api.store.jobs import request_json, too_large
from queue_api.store.run_store import RunStore
from queue_api.store.runs import RunStatus, check_run_id, run_of_call
from queue_api.wire.errors import ClientClosedError, DuplicateRequestError
from queue_api.wire.request_fields import RequestFields
from queue_api.wire.schemas import ChatMessage, GenerationRequest, GenerationResult, SamplingParams

__all__ = ["Client", "Run"]


class Client:
    """Generates text with whatever workers listen to the queue.

        async with Client() as client:
            result = await client.generate("The day after Monday is", max_tokens=8)
            run = await client.submit({"prompt": text} for text in texts)
            async for result in run.results():
                ...

    Without arguments it reads REDIS_URL and BATCHMILL_* from the environment. Results with
    `finish_reason` `error` are returned, not raised: see GenerationResult.raise_for_error.
    One client serves thousands of pending calls. It belongs to the process and event loop that
    use it first.

    :raises RedisAccessError: at the first use: nothing answers, wrong password, unfit server
    :raises WrongOwnerError: at any use from another process or event loop; a RuntimeError
    :raises ClientClosedError: at any use after `close`, and of what waits then; a RuntimeError
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        queue: str | None = None,
        settings: QueueSettings | None = None,
        wait_when_full: bool = True,
    ) -> None:
        loaded = settings or QueueSettings.load()
        given = {"redis_url": url, "queue": queue}
        update = {name: value for name, value in given.items() if value is not None}
        self.settings = loaded.model_copy(update=update)
        self.wait_when_full = wait_when_full
        """When the queue is at its limit: wait for room, or raise QueueFullError."""
        self.store = RunStore(self.settings)
        self.reader = ResultReader(self.store)
        self._interactive = Interactive(self.store, self.reader, wait_when_full)
        self._is_closed = False

    async def __aenter__(self) -> Client:
        self.check()
        try:
            await self.store.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of Redis. What was submitted goes on without us.

        Whoever waits for results of this client gets a ClientClosedError.
        """
        if self._is_closed:
            return
        if not self.store.owner.is_gone:
            self.check()
            self._is_closed = True
            self._interactive.stop()
            await self.reader.close()
            await self._interactive.close()
        self._is_closed = True
        await self.store.close()

    def check(self) -> None:
        """Come from the process and event loop that have the client, before it is closed.

        :raises ClientClosedError: see the class
        :raises WrongOwnerError: see the class
        """
        if self._is_closed:
            raise ClientClosedError("the client is closed; make another one")
        self.store.owner.check()

    async def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[ChatMessage | Mapping[str, Any]] | None = None,
        id: str | None = None,  # noqa: A002 - it is the request's `id` everywhere
        metadata: Mapping[str, Any] | None = None,
        return_token_ids: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - it also withdraws the request
        **fields: Unpack[RequestFields],
    ) -> GenerationResult:
        """Continue one prompt; `fields` are those of SamplingParams and GenerationRequest.

        With an `id` of your own the call is idempotent: it is a run of one, named after the id
        and the queue, and a second call joins the first, in whichever process, while its result is
        kept; on another queue, where another model may be, the same id is another call. When
        the `timeout` (seconds) passes, or the call is cancelled, the request is too, unless it
        has an id: then it goes on, and calling again gets its result.

        :raises InvalidRequestError: unknown field, wrong type, out of range
        :raises RequestTooLargeError: no job could hold it
        :raises DuplicateRequestError: another prompt has this id
        :raises TimeoutError: see above
        :raises ClientClosedError: the client is closed, now or while it waits
        """
        self.check()
        # What has a wrong type is left as it is: it is told by its field's name.
        given: dict[str, Any] = {"id": uuid4().hex if id is None else id, **fields}
        if prompt is not None:
            ids = isinstance(prompt, Iterable) and not isinstance(prompt, str | bytes)
            given["prompt"] = list(prompt) if ids else prompt
        if messages is not None:
            listed = isinstance(messages, Iterable) and not isinstance(messages, str | Mapping)
            given["messages"] = [_plain(m) for m in messages] if listed else messages
        if metadata:
            given["metadata"] = _plain(metadata)
        if return_token_ids:
            given["return_token_ids"] = True
        request = as_request(given, 0)
        call = self._interactive.generate if id is None else self._generate_once
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                return await call(request)
        except TimeoutError:
            if not limit.expired():
                raise
            after = "withdrawn" if id is None else "it goes on; call again to get its result"
            raise TimeoutError(
                f"request {request.id!r}: no result within {timeout} s; {after}"
            ) from None

    async def _generate_once(self, request: GenerationRequest) -> GenerationResult:
        if (error := too_large(request_json(request))) is not None:
            raise error
        run_id = run_of_call(self.settings.queue, request.id)
        mark = fingerprint([request])
        there = await self.store.open(
            run_id, queue=self.settings.queue, chunk_size=1, fingerprint=mark
        )
        if there.get("fingerprint") != mark:
            raise DuplicateRequestError(
                f"id {request.id!r} belongs to another prompt or other sampling fields"
            )
        run = await self.submit([request], run_id)
        async with aclosing(run.results()) as results:
            return await anext(results)

    async def submit(
        self,
        requests: Requests,
        run: str | None = None,
        *,
        queue: str | None = None,
        chunk_size: int | None = None,
        defaults: SamplingParams | None = None,
    ) -> Run:
        """Put many requests on the queue; they are GenerationRequests, mappings or prompts.

        A request that is wrong, or has another's id, becomes an error result; the others go on.
        Submitting the same requests as the same `run` again, after a crash say, makes nothing
        twice. `defaults` apply to mappings and prompts. Memory: the ids of the run. A list of
        requests is kept by the run's handle, which sends again what Redis loses of them; what an
        iterator gave isn't kept.

        :raises InvalidRequestError: the run id belongs to other requests
        :raises QueueFullError: the queue is full, for a client that doesn't wait
        """
        self.check()
        submission = self.submission(run, queue=queue, chunk_size=chunk_size, defaults=defaults)
        await submission.run(requests)
        return self.submitted(submission, requests)

    def submission(
        self,
        run: str | None,
        *,
        queue: str | None = None,
        chunk_size: int | None = None,
        defaults: SamplingParams | None = None,
    ) -> Submission:
        """What `submit` does, for who takes the requests to it one by one.

        :raises InvalidRequestError: no run can have this id
        """
        return Submission(
            self.store,
            check_run_id(run if run is not None else uuid4().hex),
            queue=queue or self.settings.queue,
            chunk_size=chunk_size or self.settings.chunk_size,
            defaults=defaults,
            wait_when_full=self.wait_when_full,
        )

    def submitted(self, submission: Submission, requests: Requests) -> Run:
        """The run of a submission that is through with these requests."""

        async def submit_again(indexes: Collection[int]) -> None:
            await submission.anew().run(requests, frozenset(indexes))

        kept = submit_again if isinstance(requests, Sequence) else None
        return Run(submission.run_id, self.store, self.reader, submission.ids, kept)

    def run(self, run_id: str) -> Run:
        """A run submitted before, here or elsewhere; that it exists shows at the first use.

        :raises InvalidRequestError: no run can have this id
        """
        return Run(check_run_id(run_id), self.store, self.reader)

    async def status(self, run_id: str) -> RunStatus:
        """:raises RunNotFoundError: no such run"""
        return await self.run(run_id).status()

    async def cancel(self, run_id: str, request_id: str | None = None) -> int:
        """Cancel a run, or one request of it; see Run.cancel."""
        return await self.run(run_id).cancel(request_id)


def _plain(given: object) -> object:
    if isinstance(given, ChatMessage):
        return given.model_dump(exclude_none=True)
    return dict(given) if isinstance(given, Mapping) else given
