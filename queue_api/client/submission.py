"""What producers hand in, made into numbered, checked requests of a run."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterable, Container, Iterable, Mapping, Sequence
from typing import Any

from queue_api.client.chunk_writer import ChunkWriter
from queue_api.store.jobs import request_from_fields, request_json
from queue_api.store.run_store import RunStore
from queue_api.wire.errors import DuplicateRequestError, InvalidRequestError, RequestError
from queue_api.wire.sampling import own_names
from queue_api.wire.schemas import MAX_ID_CHARS, GenerationRequest, GenerationResult, SamplingParams

__all__ = [
    "RequestLike",
    "Requests",
    "Submission",
    "as_request",
    "default_id",
    "fingerprint",
    "request_id",
    "several",
    "with_defaults",
]

RequestLike = GenerationRequest | Mapping[str, Any] | str | GenerationResult
"""A request, its fields with the sampling fields flat among them, or just a prompt; or the result
of one that ended before it began, such as a row that can't be read."""
Requests = Iterable[RequestLike] | AsyncIterable[RequestLike]
Item = GenerationRequest | GenerationResult

YIELD_S = 0.01
"""So long the event loop may be kept from its other work."""
HEAD = 32
"""So many requests tell at once whether a run id is used again for something else."""


def as_request(
    given: object, index: int, defaults: SamplingParams | None = None
) -> GenerationRequest:
    """Check a request as producers write it; its id is its index unless it has one.

    :raises InvalidRequestError: unknown field, wrong type, out of range
    """
    if isinstance(given, GenerationRequest):
        return given
    if isinstance(given, str):
        given = {"prompt": given}
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"a request is an object or a text, not {given!r:.60}")
    fields: dict[str, object] = {"id": str(index), **given}
    if defaults is not None:
        fields = with_defaults(fields, defaults)
    return request_from_fields(fields)


def with_defaults(fields: Mapping[str, object], defaults: SamplingParams) -> dict[str, object]:
    """These fields and the defaults for what they leave out, in a `sampling` of theirs, too."""
    given = defaults.model_dump(exclude_unset=True)
    nested = fields.get("sampling")
    if nested is None:
        return {**given, **own_names(fields)}
    if isinstance(nested, Mapping):
        return {**fields, "sampling": {**given, **own_names(nested)}}
    if isinstance(nested, SamplingParams):
        own = nested.model_dump(exclude_unset=True)
        return {**fields, "sampling": {**given, **own}}
    return dict(fields)  # its type is wrong, which is told by its name


def request_id(given: object, index: int) -> str:
    """The id of a request that may be wrong in every way; its index if it has no good one."""
    known = given.get("id") if isinstance(given, Mapping) else getattr(given, "id", None)
    if not isinstance(known, str) or not 0 < len(known) <= MAX_ID_CHARS:
        return str(index)
    return known.encode(errors="backslashreplace").decode()[:MAX_ID_CHARS]


def default_id(index: int, taken: Container[str]) -> str:
    """The id of a request without one: its index, or one made of it if another has that id."""
    found = str(index)
    while found in taken:
        found = f"row-{found}"
    return found


def _has_id(given: object) -> bool:
    return not isinstance(given, Mapping | str) or (isinstance(given, Mapping) and "id" in given)


def _renamed(request: GenerationRequest, name: str) -> GenerationRequest:
    return request if request.id == name else request.model_copy(update={"id": name})


def fingerprint(items: Sequence[Item]) -> str:
    """Tells requests from others; the same for the same, in any process."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(_item_json(item) + b"\n")
    return digest.hexdigest()


def _item_json(item: Item) -> bytes:
    """:raises InvalidRequestError: it can't be written as JSON"""
    if isinstance(item, GenerationRequest):
        return request_json(item)
    try:
        return item.model_dump_json(exclude_defaults=True).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"can't be written as JSON: {str(error)[:80]}") from None


def several(requests: Iterable[RequestLike]) -> Iterable[RequestLike]:
    """The requests, unless it is one alone that was given.

    :raises InvalidRequestError: a text or a mapping
    """
    if isinstance(requests, str | Mapping):
        raise InvalidRequestError("submit takes several requests: put the one into a list")
    return requests


class Submission:
    """One act of submitting a run. Doing it again after a crash makes nothing twice.

    Either `run` does it all, or somebody calls `take` for each request, `send` when that says so,
    and `end`; `take` needs no event loop.
    """

    def __init__(
        self,
        store: RunStore,
        run: str,
        *,
        queue: str,
        chunk_size: int,
        defaults: SamplingParams | None,
        wait_when_full: bool,
    ) -> None:
        self._store = store
        self.run_id = run
        self._queue = queue
        self._chunk_size = chunk_size
        self._defaults = defaults
        self._wait_when_full = wait_when_full
        self.ids: list[str] = []
        """By index."""
        self._places: dict[str, int] = {}
        self._content = hashlib.blake2b(digest_size=16)
        self._writer: ChunkWriter | None = None
        self._head: list[Item] = []
        self._only: frozenset[int] | None = None
        self._known_total: int | None = None

    async def run(self, requests: Requests, only: frozenset[int] | None = None) -> None:
        """Put them all on the queue; with `only`, those at these indexes.

        :raises InvalidRequestError: the run id belongs to other requests
        :raises QueueFullError: the queue is full and it isn't to wait
        """
        self._only = only
        if isinstance(requests, AsyncIterable):
            async for given in requests:
                if self.take(given):
                    await self.send()
        else:
            yielded_at = time.monotonic()
            for given in several(requests):
                if self.take(given):
                    await self.send()
                elif time.monotonic() - yielded_at < YIELD_S:
                    continue
                else:
                    await asyncio.sleep(0)
                yielded_at = time.monotonic()
        await self.end()

    def anew(self) -> Submission:
        """The same act, not begun."""
        return Submission(
            self._store,
            self.run_id,
            queue=self._queue,
            chunk_size=self._chunk_size,
            defaults=self._defaults,
            wait_when_full=self._wait_when_full,
        )

    def take(self, given: RequestLike) -> bool:
        """Check the next request; True if it is time to `send`.

        :raises InvalidRequestError: the run id belongs to other requests
        """
        index = len(self.ids)
        if self._known_total is not None and index >= self._known_total:
            raise self._other_content()
        item, as_json = self._check(given, index)
        self.ids.append(item.id)
        self._content.update(as_json + b"\n")
        if self._writer is not None:
            return self._put(self._writer, index, item, as_json)
        self._head.append(item)
        return len(self._head) >= HEAD

    async def send(self) -> None:
        """Put on the queue what was taken.

        :raises InvalidRequestError: the run id belongs to other requests
        :raises QueueFullError: the queue is full and it isn't to wait
        """
        if self._writer is None:
            await self._open()
        else:
            await self._writer.flush()

    def _check(self, given: object, index: int) -> tuple[Item, bytes]:
        """The request, or the result that it has already, and either as JSON."""
        try:
            if isinstance(given, GenerationResult):
                ended = given.model_copy(update={"run": self.run_id, "index": index})
                return ended, _item_json(ended)
            request = as_request(given, index, self._defaults)
            if not _has_id(given):
                request = _renamed(request, default_id(index, self._places))
            as_json = request_json(request)
            self._claim_id(request.id, index)
            return request, as_json
        except RequestError as error:
            failed = GenerationResult.failed(
                request_id(given, index), error, run=self.run_id, index=index
            )
            return failed, _item_json(failed)

    def _claim_id(self, request_id: str, index: int) -> None:
        if (first := self._places.setdefault(request_id, index)) != index:
            raise DuplicateRequestError(
                f"request {index} has the id {request_id!r} of request {first}; ids are "
                "unique within a run"
            )

    async def _open(self) -> ChunkWriter:
        mark = fingerprint(self._head)
        there = await self._store.open(
            self.run_id, queue=self._queue, chunk_size=self._chunk_size, fingerprint=mark
        )
        if there.get("fingerprint") != mark:
            raise self._other_content()
        status = await self._store.status(self.run_id)
        self._known_total = status.total
        self._writer = ChunkWriter(
            self._store,
            self.run_id,
            # those of the first submission: they decide in which job an index is
            queue=status.queue,
            chunk_size=status.chunk_size,
            done=await self._store.done(self.run_id),
            submitted=status.submitted,
            wait_when_full=self._wait_when_full,
            fingerprint=mark,
        )
        for index, item in enumerate(self._head):
            if self._put(self._writer, index, item):
                await self._writer.flush()
        self._head.clear()
        return self._writer

    def _put(
        self, writer: ChunkWriter, index: int, item: Item, as_json: bytes | None = None
    ) -> bool:
        if self._only is None or index in self._only:
            return writer.add(index, item, as_json)
        writer.skip(index)
        return False

    async def end(self) -> None:
        """Put the rest on the queue and say how many requests there are; raises as `send`."""
        writer = self._writer or await self._open()
        await writer.flush()
        there = await self._store.add(self.run_id, content=self._content.hexdigest())
        if there["content"] != self._content.hexdigest():
            raise self._other_content()
        await self._store.set(self.run_id, total=len(self.ids))

    def _other_content(self) -> InvalidRequestError:
        return InvalidRequestError(
            f"run {self.run_id!r} was submitted before with other requests; choose another run id"
        )
