"""An input's records for an event loop: a thread reads ahead, a bounded way."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator

from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_source import RowSource

__all__ = ["RecordStream"]

BATCH_ROWS, BATCH_BYTES = 256, 2**20
AHEAD = 4
"""Batches that are held at most."""


class RecordStream:
    """Reads a source once, from its first record on.

    What has been read is handed over at the latest when the source waits for more to come, so that
    rows of a slow pipe aren't held back.
    """

    def __init__(self, source: RowSource) -> None:
        self._source = source
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

    async def close(self) -> None:
        """Stop reading; the source may be closed then."""
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
