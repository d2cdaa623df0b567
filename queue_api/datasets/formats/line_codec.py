"""How lines are packed in a file: as they are, or as members of gzip or frames of zstd."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any, BinaryIO

from queue_api.datasets.formats.packages import import_zstd

__all__ = ["DamagedMemberError", "LineCodec", "codec_of"]

BLOCK_BYTES = 2**20


class DamagedMemberError(Exception):
    """What is at a place isn't of the codec, and isn't the beginning of it that a crash left."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


class LineCodec(ABC):
    """Each append is packed as a whole that can be read, and cut off, without the others."""

    name: str
    start = b""
    """What a new file begins with: packed nothing, so that a file without rows can be read, and
    one whose first rows were torn is known to be ours."""

    @abstractmethod
    def pack(self, lines: bytes) -> bytes:
        """Some whole lines, as they are appended."""

    @abstractmethod
    def read(self, file: BinaryIO, seen: Any = None) -> Iterator[bytes | int]:
        """Each line with its end, and, behind the lines of each whole, the offset of its end.

        Lines that no offset follows are of what a crash tore.

        :param seen: a hash that is given all bytes of the wholes
        :raises DamagedMemberError: see there
        """


class PlainLines(LineCodec):
    """Lines as they are."""

    name = "plain text"

    def pack(self, lines: bytes) -> bytes:
        return lines

    def read(self, file: BinaryIO, seen: Any = None) -> Iterator[bytes | int]:
        end = 0
        for line in file:
            yield line
            if line.endswith(b"\n"):
                end += len(line)
                if seen is not None:
                    seen.update(line)
                yield end


class PackedLines(LineCodec):
    """Members of a compression, one behind the other."""

    magic: bytes
    """What each member that we write begins with."""
    error: type[Exception]

    @abstractmethod
    def new(self) -> Any:
        """What unpacks one member: has `decompress`, `eof` and `unused_data`."""

    def read(self, file: BinaryIO, seen: Any = None) -> Iterator[bytes | int]:
        member, rest, start, end = None, b"", 0, 0
        raw: list[bytes] = []
        while block := file.read(BLOCK_BYTES):
            end += len(block)
            while block:
                if member is None:
                    member, start = self.new(), end - len(block)
                try:
                    found = member.decompress(block)
                except self.error:
                    if start and not self._has_member_behind(file, start):
                        return
                    raise DamagedMemberError(start) from None
                *lines, rest = (rest + found).split(b"\n")
                yield from (line + b"\n" for line in lines)
                left = member.unused_data if member.eof else b""
                raw.append(block[: len(block) - len(left)])
                block = left
                if member.eof:
                    if rest:
                        yield rest
                    for part in raw if seen is not None else ():
                        seen.update(part)
                    member, rest, raw = None, b"", []
                    yield end - len(left)
        if rest:
            yield rest

    def _has_member_behind(self, file: BinaryIO, start: int) -> bool:
        """Whether what is damaged isn't the last member, which a power cut may leave so."""
        file.seek(start + 1)
        rest = b""
        while block := file.read(BLOCK_BYTES):
            if self.magic in rest + block:
                return True
            rest = block[-len(self.magic) :]
        return False


class GzipMembers(PackedLines):
    """A member to each append."""

    name = "gzip"
    magic = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00"
    error = zlib.error

    @cached_property
    def start(self) -> bytes:  # type: ignore[override]
        return self.pack(b"")

    def pack(self, lines: bytes) -> bytes:
        packer = zlib.compressobj(wbits=16 + zlib.MAX_WBITS)
        return packer.compress(lines) + packer.flush()

    def new(self) -> Any:
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


class ZstdFrames(PackedLines):
    """A frame to each append.

    :raises MissingExtraError: the package isn't there
    """

    name = "zstd"
    magic = b"\x28\xb5\x2f\xfd"

    def __init__(self) -> None:
        self._zstd = zstd = import_zstd()
        self.error = zstd.ZstdError
        self.start = self.pack(b"")

    def pack(self, lines: bytes) -> bytes:
        # with a checksum, so that a byte that changed is told when it is unpacked
        options = {int(self._zstd.CompressionParameter.checksum_flag): 1}
        packed: bytes = self._zstd.compress(lines, options=options)
        return packed

    def new(self) -> Any:
        return self._zstd.ZstdDecompressor()


def codec_of(name: str) -> LineCodec:
    """The codec that a file's name asks for.

    :raises MissingExtraError: the package isn't there
    """
    lower = name.lower()
    if lower.endswith((".gz", ".gzip")):
        return GzipMembers()
    return ZstdFrames() if lower.endswith((".zst", ".zstd")) else PlainLines()
