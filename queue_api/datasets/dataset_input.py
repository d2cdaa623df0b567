"""The input of a dataset: opened once, looked at before anything is started, then read."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path

from queue_api.datasets.chosen_source import ChosenSource
from queue_api.datasets.columns import Row, RowParser, say_nothing
from queue_api.datasets.first_look import FirstLook
from queue_api.datasets.formats.object_source import Rows
from queue_api.datasets.formats.opening import Inputs, open_source
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_source import RowSource
from queue_api.datasets.layout.layout import Layout
from queue_api.datasets.record_stream import RecordStream
from queue_api.datasets.row_selection import RowSelection
from queue_api.wire.errors import DatasetError
from queue_api.wire.schemas import SamplingParams

__all__ = ["DatasetInput"]


class DatasetInput:
    """Files, a pipe, the standard input or rows, and their records in an event loop; the
    parameters are open_source's.

    :raises DatasetError: they can't be opened
    :raises ConfigurationError: there is no such format
    """

    def __init__(
        self,
        inputs: Inputs | Rows | RowSource,
        *,
        format: str | None = None,  # noqa: A002 - as on the command line
        output: Path | str = "",
        selection: RowSelection | None = None,
    ) -> None:
        self.source = (
            inputs
            if isinstance(inputs, RowSource)
            else open_source(inputs, format=format, output=output)
        )
        """All of the input's rows."""
        self.chosen = self.source
        """Those that are asked for."""
        if selection is not None and not selection.is_all:
            self._choose(selection)
        self._ahead: list[list[Record]] = []
        """Batches that were read to look at them."""
        self.how_read = ""
        """Where the first row has its prompt, once it was looked at."""
        self._stream: RecordStream | None = None

    def _choose(self, selection: RowSelection) -> None:
        try:
            self.chosen = ChosenSource(self.source, selection)
        except DatasetError:
            self.source.close()
            raise

    def of_rows(self, numbers: Sequence[int], *, are_sorted: bool = True) -> DatasetInput:
        """The same input, of which these rows are asked for, in this order."""
        part = copy.copy(self)
        selection = RowSelection(shuffle=not are_sorted)
        part.chosen = ChosenSource(self.source, selection, numbers)
        part._ahead, part._stream = [], None
        return part

    async def start_over(self) -> None:
        """Have `batches` begin with the first record again, of an input that is repeatable."""
        await self.stop_reading()
        self._stream = None

    async def stop_reading(self) -> None:
        """End what reads ahead; the input stays open."""
        if self._stream is not None:
            await self._stream.close()

    async def close(self) -> None:
        """Let go of the input."""
        if self._stream is not None:
            await self._stream.close()
        self.source.close()

    async def look(
        self,
        defaults: SamplingParams | None = None,
        fields: frozenset[str] | None = None,
        layout: Layout | None = None,
    ) -> None:
        """See that there is a row that can be read; all of a file is looked at to find one.

        :raises DatasetError: there are rows and none can be read; says what there is instead
        :raises DatasetError: the layout names a column that the first rows don't have
        """
        parser = RowParser(
            defaults,
            warn=say_nothing,
            fields=fields,
            layout=layout or Layout(),
            place=self.source.place,
        )
        first = FirstLook(self.source, parser)
        async with aclosing(self._first_batches()) as batches:
            async for batch in batches:
                is_done = any(first.take(record) for record in batch)
                self.how_read = first.how_read
                if is_done:
                    return
                if first.is_enough:
                    break
        first.judge()

    async def _first_batches(self) -> AsyncGenerator[list[Record], None]:
        """The first records; of what can be read only once, they come again in `records`."""
        if self.source.is_repeatable:
            stream = RecordStream(self.source)
        else:
            stream = self._stream = self._stream or RecordStream(self.chosen)
        try:
            async with aclosing(stream.batches()) as batches:
                async for batch in batches:
                    if stream is self._stream:
                        self._ahead.append(batch)
                    yield batch
        finally:
            if stream is not self._stream:
                await stream.close()

    @property
    def held(self) -> list[Record]:
        """What was looked at of an input that can be read only once; nothing of a file."""
        return [record for batch in self._ahead for record in batch]

    async def batches(self) -> AsyncGenerator[list[Record], None]:
        """Each record, once, some at a time, never none.

        :raises DatasetError: the input can't be read on
        """
        while self._ahead:
            yield self._ahead.pop(0)
        self._stream = self._stream or RecordStream(self.chosen)
        async with aclosing(self._stream.batches()) as batches:
            async for batch in batches:
                yield batch

    async def rows(self, parser: RowParser) -> AsyncGenerator[Row, None]:
        """Its rows; what is wrong with one stands in its `request`."""
        async with aclosing(self.batches()) as batches:
            async for batch in batches:
                for record in batch:
                    yield parser.parse(record)
