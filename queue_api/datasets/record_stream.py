"""An input's records for an event loop; where they may be long in coming, a thread reads ahead."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator

from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_source import RowSource
from queue_api.wire.errors import DatasetError

__all__ = ["RecordStream"]

BATCH_ROWS, BATCH_BYTES = 256, 2**20
LOOP_BYTES = 2**18
"""So much is read in the loop before others have their turn."""
AHEAD = 4
"""Batches that are held at most."""


class RecordStream:
    """Reads a source once, from its first record on.

    A source that never waits is read in the loop: with a thread beside it, the two would fight for
    the interpreter (measured: two thirds of the rows per second). Of others, what has been read is
    handed over at the latest when the source waits for more to come, so that rows of a slow pipe
    aren't held back.
    """

    def __init__(self, source: RowSource) -> None:
        self._source = source
        self._thread: threading.Thread | None = None
        if not source.waits:
            self._records = source.records()
            return
        self._loop = asyncio.get_running_loop()
        self._batches: deque[list[Record]] = deque()
        self._free = threading.Semaphore(AHEAD)
        self._changed = asyncio.Event()
        self._batch: list[Record] = []
        self._error: BaseException | None = None
        self._has_ended = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._read, name="records", daemon=True)
        self._thread.start()

    async def batches(self) -> AsyncGenerator[list[Record], None]:
        """Some records at a time, never none.

        :raises DatasetError: the source can't be read on
        """
        if self._thread is None:
            async for batch in self._read_here():
                yield batch
            return
        while True:
            while not self._batches:
                if self._has_ended:
                    if self._error is not None:
                        raise self._error
                    return
                self._changed.clear()
                await self._changed.wait()
            self._free.release()
            yield self._batches.popleft()

    async def _read_here(self) -> AsyncGenerator[list[Record], None]:
        num_bytes, error = 0, None
        while error is None:
            batch, size, error = self._next_batch()
            if batch:
                yield batch
            num_bytes += size
            if num_bytes >= LOOP_BYTES:
                num_bytes = 0
                await asyncio.sleep(0)
        if not isinstance(error, StopIteration):
            raise error

    def _next_batch(self) -> tuple[list[Record], int, Exception | None]:
        """Some records, their bytes, and what ended the reading, if it has ended."""
        batch: list[Record] = []
        num_bytes = 0
        try:
            while len(batch) < BATCH_ROWS and num_bytes < BATCH_BYTES:
                record = next(self._records)
                batch.append(record)
                num_bytes += record.num_bytes or len(record.raw or b"")
        except (StopIteration, DatasetError) as error:
            return batch, num_bytes, error
        return batch, num_bytes, None

    async def close(self) -> None:
        """Stop reading; the source may be closed then."""
        if self._thread is None:
            return
        self._is_closed = True
        self._free.release()
        # else the thread waits in somebody's code; it ends when that has done, or with the process
        while self._thread.is_alive() and self._source.can_interrupt:
            self._source.interrupt()
            await asyncio.to_thread(self._thread.join, 1)

    def _read(self) -> None:
        num_bytes = 0
        self._source.before_waiting = self._hand_over
        try:
            for record in self._source.records():
                self._batch.append(record)
                num_bytes += record.num_bytes or len(record.raw or b"")
                if len(self._batch) >= BATCH_ROWS or num_bytes >= BATCH_BYTES:
                    self._hand_over()
                    num_bytes = 0
                if self._is_closed:
                    return
            self._hand_over()
        except BaseException as error:  # whoever waits for records gets it
            self._hand_over()
            self._error = error
        finally:
            self._has_ended = True
            self._tell()

    def _hand_over(self) -> None:
        if self._batch and not self._is_closed:
            self._free.acquire()
            self._batches.append(self._batch)
            self._batch = []
            self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who waits
            self._loop.call_soon_threadsafe(self._changed.set)
