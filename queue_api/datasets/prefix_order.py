"""The order in which rows are asked for so that prompts that begin alike go together.

A worker doesn't compute again what it has in its cache. So rows are sorted by what their prompts
begin with, which is the order of a trie's leaves, and the sorted rows are cut into lanes, one for
each worker: chunk `c` is of lane `c % num_lanes`, and a worker keeps to its lane while there is
something in it (claim.lua). What is at the end of a lane is asked for longest first (Graham,
"Bounds on Multiprocessing Timing Anomalies", 1969), or a long text would be made alone there.
"""

from __future__ import annotations

import sqlite3
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from queue_api.datasets.columns import RowParser
from queue_api.datasets.formats.row_source import RowSource
from queue_api.wire.errors import DatasetError
from queue_api.wire.sampling import own_names
from queue_api.wire.schemas import SamplingParams

__all__ = ["prefix_order"]

EXACT_BYTES = 4096
"""So much of a prompt is compared as it is, the rest by blocks."""
BLOCKS_BEFORE = 32
"""A block is as long as the text before it over this."""
SORT_KIB = 16 * 1024
"""Memory of the sort, which goes to a temporary file beyond that."""
SEQUENCES = 64
"""That a worker makes at a time, unless it was told otherwise."""
SLACK = 1.5
MOST_COMPUTED_AGAIN = 0.02
"""Of what there is to compute of a lane's prompts, for the sake of the order at its end."""
DEFAULT_TOKENS = SamplingParams().max_tokens
MOST_TOKENS = 2**32
"""Who asks for more is refused."""


def prefix_order(
    source: RowSource, parser: RowParser, *, num_lanes: int, chunk_size: int
) -> Sequence[int]:
    """The numbers of a source's rows; reads all of it. Memory for some 30 bytes a row, and room in
    temporary files for each prompt's first 4 KiB, twice.

    :param parser: one of its own, which warns of nothing
    :raises DatasetError: the source can't be read, or there is no room to sort its rows
    """
    rows, last = _Rows(), b""
    try:
        with closing(sqlite3.connect("", isolation_level=None)) as base:
            base.execute(f"PRAGMA cache_size = -{SORT_KIB}")
            base.execute("PRAGMA journal_mode = OFF")
            base.execute("CREATE TABLE rows (start BLOB, size INTEGER, number INTEGER)")
            base.execute("BEGIN")
            base.executemany("INSERT INTO rows VALUES (?, ?, ?)", _outlines(source, parser))
            found = base.execute("SELECT * FROM rows ORDER BY start, size DESC, number")
            for start, size, number in found:
                rows.add(number, size, len(start), _num_common(last, start))
                last = start
    except sqlite3.Error as error:
        raise DatasetError(
            f"the rows of {source.name} can't be sorted in a temporary file: {error}"
        ) from None
    lanes: list[array[int]] = []
    for begin, end in _lane_bounds(len(rows.numbers), num_lanes, chunk_size):
        lane = rows.part(begin, end)
        if len(lanes) % 2:
            lane.reverse()  # two end where they meet, and help each other out there
        lanes.append(lane.in_order())
    return _interleaved(lanes, chunk_size)


@dataclass
class _Rows:
    """Rows in the order of a trie's leaves."""

    numbers: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("B"))
    """Binary order of magnitude of the tokens that each may get."""
    lengths: array[int] = field(default_factory=lambda: array("I"))
    """Of what was compared of each prompt."""
    shared: array[int] = field(default_factory=lambda: array("I"))
    """How much of that is as in the row before."""

    def add(self, number: int, size: int, length: int, shared: int) -> None:
        self.numbers.append(number)
        self.sizes.append(size)
        self.lengths.append(length)
        self.shared.append(shared)

    def part(self, begin: int, end: int) -> _Rows:
        """Those from one place to another."""
        arrays = self.numbers, self.sizes, self.lengths, self.shared
        found = _Rows(*(values[begin:end] for values in arrays))
        if found.shared:
            found.shared[0] = 0
        return found

    def reverse(self) -> None:
        """Turn the order round."""
        self.shared = self.shared[1:] + self.shared[:1]
        for values in (self.numbers, self.sizes, self.lengths, self.shared):
            values.reverse()

    def in_order(self) -> array[int]:
        """The numbers; at the end so many of the last rows by their size that a longest one ends
        before they do, or fewer if too much would have to be computed again."""
        enough = SLACK * SEQUENCES * 2 ** max(self.sizes, default=0)
        most = MOST_COMPUTED_AGAIN * self._computed(0, by_size=False)
        while True:
            begin = self._last_rows(enough)
            again = self._computed(begin, by_size=True) - self._computed(begin, by_size=False)
            if again <= most:
                break
            enough /= 2
        ordered = self.numbers[:begin]
        for size in sorted(set(self.sizes[begin:]), reverse=True):
            places = range(begin, len(self.numbers))
            ordered.extend(self.numbers[i] for i in places if self.sizes[i] == size)
        return ordered

    def _last_rows(self, enough: float) -> int:
        """Where those begin that may get so many tokens."""
        begin = len(self.numbers)
        while begin and enough >= 1:
            begin -= 1
            enough -= 2 ** self.sizes[begin]
        return begin

    def _computed(self, begin: int, *, by_size: bool) -> int:
        """What there is to compute of the prompts from there on, in order or the largest first."""
        shared: dict[int, int] = {}
        """By size, with the last row of that."""
        computed = 0
        for i in range(begin, len(self.numbers)):
            size = self.sizes[i] if by_size else 0
            shared = {other: min(end, self.shared[i]) for other, end in shared.items()}
            computed += self.lengths[i] - shared.get(size, 0)
            shared[size] = self.lengths[i]
        return computed


def _outlines(source: RowSource, parser: RowParser) -> Iterator[tuple[bytes, int, int]]:
    """Of each row what stands for its prompt's beginning, the binary order of magnitude of the
    tokens that it may get, and its number."""
    for place, record in enumerate(source.records()):
        fields = parser.fields_of(record)
        number = place if record.row is None else record.row
        yield _start_of(_prompt(fields)), _most_tokens(fields).bit_length(), number


def _prompt(fields: Mapping[str, Any]) -> str:
    """Texts that begin alike for prompts that do."""
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        return " ".join(map(str, prompt))
    parts = [str(fields.get("tools", ""))]
    messages = fields.get("messages")
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, Mapping):
            parts += [str(message.get("role")), str(message.get("content"))]
    return "\0".join(parts)


def _start_of(text: str) -> bytes:
    """In the order of these, texts are beside those that they share the most with.

    Of a long one, four bytes stand for each full block, the same for the same.
    """
    data = text.encode(errors="replace")
    marks, start = [data[:EXACT_BYTES]], EXACT_BYTES
    while (end := start + start // BLOCKS_BEFORE) <= len(data):
        marks.append(zlib.crc32(data[start:end]).to_bytes(4, "big"))
        start = end
    return b"".join(marks)


def _num_common(first: bytes, second: bytes) -> int:
    """Bytes, from the start on."""
    length = min(len(first), len(second))
    differing = int.from_bytes(first[:length], "big") ^ int.from_bytes(second[:length], "big")
    return length - (differing.bit_length() + 7) // 8


def _most_tokens(fields: Mapping[str, Any]) -> int:
    nested = fields.get("sampling")
    given = own_names(nested if isinstance(nested, Mapping) else fields).get("max_tokens")
    return min(given, MOST_TOKENS) if isinstance(given, int) and given > 0 else DEFAULT_TOKENS


def _lane_bounds(num_rows: int, num_lanes: int, chunk_size: int) -> Iterator[tuple[int, int]]:
    """Where in the sorted rows each lane begins and ends; only the run's last chunk isn't full."""
    num_chunks = -(-num_rows // chunk_size)
    start = 0
    for lane in range(num_lanes):
        of_lane = len(range(lane, num_chunks, num_lanes))
        end = start + of_lane * chunk_size
        if of_lane and (num_chunks - 1) % num_lanes == lane:
            end -= num_chunks * chunk_size - num_rows
        yield start, end
        start = end


def _interleaved(lanes: Sequence[array[int]], chunk_size: int) -> array[int]:
    """A chunk of each lane in turn."""
    ordered = array("Q")
    for start in range(0, max(map(len, lanes)), chunk_size):
        for lane in lanes:
            ordered.extend(lane[start : start + chunk_size])
    return ordered
