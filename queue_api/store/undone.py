"""The requests of a run that have no result, a page at a time: a run may have millions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from queue_api.store.bitmap import Bitmap
from queue_api.store.jobs import JobPayloadError, chunk_job_id, decode_chunk, single_job_id
from queue_api.store.run_store import RunStore
from queue_api.store.runs import RunStatus

__all__ = ["open_chunks", "pages", "request_ids", "undone"]


async def undone(
    store: RunStore, status: RunStatus, indexes: Iterable[int] | None = None
) -> Iterator[int]:
    """Which of these requests (default: all that were submitted) have no result now, in order."""
    done = await store.done(status.id)
    if indexes is not None:
        return (index for index in indexes if index not in done)
    return done.missing(status.submitted)


def pages(indexes: Iterable[int], chunk_size: int, at_least: int) -> Iterator[list[int]]:
    """Rising indexes in lists of whole chunks, each of `at_least` so many but for the last."""
    page: list[int] = []
    for _, inside in groupby(indexes, lambda index: index // chunk_size):
        page += inside
        if len(page) >= at_least:
            yield page
            page = []
    if page:
        yield page


def open_chunks(done: Bitmap, status: RunStatus) -> Iterator[int]:
    """The chunks of which a submitted request has no result."""
    size, end = status.chunk_size, status.submitted
    for chunk in range(-(-end // size)):
        if next(done.missing(min((chunk + 1) * size, end), chunk * size), None) is not None:
            yield chunk


async def request_ids(
    store: RunStore,
    status: RunStatus,
    indexes: Iterable[int],
    id_of: Callable[[int], str | None] = lambda _: None,
) -> dict[int, str]:
    """The ids of these requests: known here, read from their jobs, else the index as text."""
    ids = {index: id_of(index) for index in indexes}
    chunks = sorted({index // status.chunk_size for index, known in ids.items() if known is None})
    await _read_ids(store, [chunk_job_id(status.id, chunk) for chunk in chunks], ids)
    # only of a chunk that is gone: there are as many singles as requests
    unknown = [index for index, known in ids.items() if known is None]
    await _read_ids(store, [single_job_id(status.id, index) for index in unknown], ids)
    return {index: known if known is not None else str(index) for index, known in ids.items()}


async def _read_ids(store: RunStore, job_ids: list[str], ids: dict[int, str | None]) -> None:
    for job_id, (data,) in zip(job_ids, await store.job_fields(job_ids, "data"), strict=True):
        for index, request in _items(job_id, data):
            if index in ids and ids[index] is None and isinstance(request, dict):
                ids[index] = str(request.get("id", index))


def _items(job_id: str, data: bytes | None) -> list[tuple[int, object]]:
    if data is None:
        return []
    try:
        return decode_chunk(job_id, data).items
    except JobPayloadError:
        return []
