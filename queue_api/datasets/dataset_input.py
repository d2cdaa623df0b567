"""The input of a dataset: opened once, looked at before anything is started, then read."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from queue_api.datasets.columns import Row, RowParser
from queue_api.datasets.formats.opening import Inputs, open_source
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.unreadable import LINE_BYTES, why_unreadable
from queue_api.datasets.record_stream import RecordStream
from queue_api.wire.errors import DatasetError, RequestError
from queue_api.wire.schemas import SamplingParams

__all__ = ["DatasetInput"]

LOOK_AT_ROWS = 1000
LOOK_AT_BYTES = 8 * 2**20
"""Of what can be read only once so much is held at most, to be looked at."""


class DatasetInput:
    """Files, a pipe or, as `-`, the standard input, and their records in an event loop; the
    parameters are open_source's.

    :raises DatasetError: they can't be opened
    :raises ConfigurationError: there is no such format
    """

    def __init__(
        self,
        inputs: Inputs,
        *,
        format: str | None = None,  # noqa: A002 - as on the command line
        output: Path | str = "",
    ) -> None:
        self.source = open_source(inputs, format=format, output=output)
        self._ahead: list[list[Record]] = []
        """Batches that were read to look at them."""
        self._stream: RecordStream | None = None

    async def close(self) -> None:
        """Let go of the input."""
        if self._stream is not None:
            await self._stream.close()
        self.source.close()

    async def look(
        self, defaults: SamplingParams | None = None, fields: frozenset[str] | None = None
    ) -> None:
        """See that there is a row that can be read; all of a file is looked at to find one.

        :raises DatasetError: there are rows and none can be read; says what there is instead
        """
        parser = RowParser(defaults, warn=_say_nothing, fields=fields, place=self.source.place)
        seen, first_lines, num_rows, num_bytes = list[Row](), list[bytes | None](), 0, 0
        async with aclosing(self._first_batches()) as batches:
            async for batch in batches:
                for record in batch:
                    row = parser.parse(record)
                    num_rows += 1
                    num_bytes += record.num_bytes or len(record.raw or b"")
                    if not isinstance(row.request, RequestError):
                        return
                    if len(seen) < LOOK_AT_ROWS:
                        seen.append(row)
                        first_lines.append(record.raw and record.raw[:LINE_BYTES])
                is_enough = num_rows >= LOOK_AT_ROWS or num_bytes >= LOOK_AT_BYTES
                if is_enough and not self.source.is_repeatable:
                    break
        if seen:
            known = self.source.advice(first_lines)
            raise DatasetError(why_unreadable(self.source.name, seen, num_rows, known))

    async def _first_batches(self) -> AsyncGenerator[list[Record], None]:
        """The first records; of what can be read only once, they come again in `records`."""
        if self.source.is_repeatable:
            stream = RecordStream(self.source)
        else:
            stream = self._stream = self._stream or RecordStream(self.source)
        try:
            async with aclosing(stream.batches()) as batches:
                async for batch in batches:
                    if stream is self._stream:
                        self._ahead.append(batch)
                    yield batch
        finally:
            if stream is not self._stream:
                await stream.close()

    async def batches(self) -> AsyncGenerator[list[Record], None]:
        """Each record, once, some at a time, never none.

        :raises DatasetError: the input can't be read on
        """
        while self._ahead:
            yield self._ahead.pop(0)
        self._stream = self._stream or RecordStream(self.source)
        async with aclosing(self._stream.batches()) as batches:
            async for batch in batches:
                yield batch

    async def rows(self, parser: RowParser) -> AsyncGenerator[Row, None]:
        """Its rows; what is wrong with one stands in its `request`."""
        async with aclosing(self.batches()) as batches:
            async for batch in batches:
                for record in batch:
                    yield parser.parse(record)


def _say_nothing(_: str) -> None:
    """The rows are read again, and what there is to be told is told then."""
