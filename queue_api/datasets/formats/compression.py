"""Compressed inputs: gzip, zstd, bzip2 and xz, as if they had been unpacked before."""

from __future__ import annotations

import bz2
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

from queue_api.datasets.formats.byte_input import BLOCK_BYTES, START_BYTES, ByteInput, spooled
from queue_api.datasets.formats.packages import import_zstd
from queue_api.wire.errors import DatasetError

__all__ = ["Decompressed", "decompressed", "name_inside"]

_SUFFIX = re.compile(r"\.(gz|gzip|zst|zstd|bz2|xz)$", re.IGNORECASE)
_MOST_TIMES = 3
"""A file may have been packed twice by mistake; some unpack to themselves for ever."""
_MAY_BE_PADDED = ("gzip", "xz")


class _Decompressor(Protocol):
    """What bz2's, lzma's and zstd's have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gunzip:
    """zlib's with the methods of the others."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._member.decompress(self._member.unconsumed_tail + data, max_length)
        # a full buffer may leave something within zlib
        self.needs_input = not self._member.unconsumed_tail and len(found) < max_length
        return found


def _unzstd() -> _Decompressor:
    """:raises MissingExtraError: the package isn't there"""
    made: _Decompressor = import_zstd().ZstdDecompressor()
    return made


_KINDS: dict[str, tuple[re.Pattern[bytes], Callable[[], _Decompressor]]] = {
    "gzip": (re.compile(rb"\x1f\x8b\x08"), _Gunzip),
    # the second is a frame to be skipped, as pzstd writes first
    "zstd": (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _unzstd),
    "bzip2": (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2Decompressor),
    "xz": (re.compile(rb"\xfd7zXZ\0"), lzma.LZMADecompressor),
}


def _errors() -> tuple[type[Exception], ...]:
    """What decompressors raise of data that they can't make sense of."""
    loaded = (sys.modules.get(name) for name in ("backports.zstd", "compression.zstd"))
    of_zstd = (module.ZstdError for module in loaded if module is not None)
    return (zlib.error, OSError, EOFError, lzma.LZMAError, *of_zstd)


def name_inside(name: str) -> str:
    """The name without a compression's suffix."""
    return _SUFFIX.sub("", name)


def decompressed(data: ByteInput) -> ByteInput:
    """What is in the input; the input itself where its first bytes are of no compression."""
    for _ in range(_MOST_TIMES):
        start = data.start()
        kind = next((kind for kind, (magic, _) in _KINDS.items() if magic.match(start)), None)
        if kind is None:
            break
        data = Decompressed(data, kind)
    return data


class Decompressed(ByteInput):
    """What a compressed input holds; its members, streams or frames one after the other."""

    def __init__(self, packed: ByteInput, kind: str) -> None:
        super().__init__(packed.name)
        self._packed = packed
        self._kind = kind
        self.is_repeatable, self.waits = packed.is_repeatable, packed.waits
        packed.before_waiting = self._before_waiting
        self._once: Iterator[bytes] | None = None
        """Of what is read once and has been begun: what comes after `_ahead`."""
        self._ahead: list[bytes] = []

    def start(self) -> bytes:
        """As the others' `start`; what is damaged ends it, which `blocks` will tell."""
        ahead = [] if self.is_repeatable else self._ahead
        blocks = self._once or self._unpack()
        try:
            while not _is_enough(found := b"".join(ahead)) and (block := next(blocks, b"")):
                ahead.append(block)
        except DatasetError as error:
            blocks = _Raising(error)
        self._once = None if self.is_repeatable else blocks
        return found

    def blocks(self) -> Iterator[bytes]:
        if self._once is None:
            yield from self._unpack()
            return
        while self._ahead:
            yield self._ahead.pop(0)
        yield from self._once

    def file(self) -> BinaryIO:
        return spooled(self)

    def identity(self) -> list[str]:
        return self._packed.identity()

    def is_same_file(self, info: os.stat_result) -> bool:
        return self._packed.is_same_file(info)

    def interrupt(self) -> None:
        self._packed.interrupt()

    def close(self) -> None:
        self._packed.close()

    def _before_waiting(self) -> None:
        self.before_waiting()  # what it is by then

    def _unpack(self) -> Iterator[bytes]:
        """:raises DatasetError: it is damaged or cut off, after all that could be unpacked"""
        new = _KINDS[self._kind][1]
        member: _Decompressor | None = None
        for packed in self._packed.blocks():
            block = packed
            while block or (member is not None and not member.needs_input):
                if member is None:
                    if self._kind in _MAY_BE_PADDED and not (block := block.lstrip(b"\0")):
                        break
                    member = new()
                try:
                    found = member.decompress(block, BLOCK_BYTES)
                except _errors() as error:
                    raise DatasetError(
                        f"{self.name} is damaged {self._kind}: {error}; what comes before that "
                        "place was read"
                    ) from None
                block = b""
                if found:
                    yield found
                if member.eof:
                    block, member = member.unused_data, None
        if member is not None:
            raise DatasetError(
                f"{self.name} is {self._kind} that was cut off: its end is missing; what there is "
                "was read"
            )


def _is_enough(start: bytes) -> bool:
    return len(start) >= START_BYTES or b"\n" in start


class _Raising(Iterator[bytes]):
    """Blocks of which the first can't be read."""

    def __init__(self, error: DatasetError) -> None:
        self._error = error

    def __next__(self) -> bytes:
        raise self._error
