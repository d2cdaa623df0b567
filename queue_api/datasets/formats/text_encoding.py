"""Text of any of Unicode's encodings to UTF-8, as it comes."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator

__all__ = ["Utf8Encoder", "start_in_utf8", "utf8_blocks"]


class Utf8Encoder:
    """Makes UTF-8 of blocks, without a byte order mark in front.

    UTF-16 and UTF-32 are known by their byte order mark or their zeros. What isn't in the encoding
    becomes something that isn't UTF-8 either, so that whoever reads on finds it.
    """

    def __init__(self) -> None:
        self._start: bytes | None = b""
        """What has come until it is enough to tell the encoding; None from then on."""
        self._decoder: codecs.IncrementalDecoder | None = None

    def feed(self, block: bytes) -> bytes:
        """What can be said so far."""
        if self._start is not None:
            block = self._start + block
            if len(block) < 4:
                self._start = block
                return b""
            block = self._begin(block)
        return self._encode(block)

    def finish(self) -> bytes:
        """What is left."""
        block = b"" if self._start is None else self._begin(self._start)
        return self._encode(block, final=True)

    def _begin(self, start: bytes) -> bytes:
        """Look which encoding it is."""
        self._start = None
        encoding = json.detect_encoding(start)
        if encoding.startswith(("utf-16", "utf-32")):
            self._decoder = codecs.getincrementaldecoder(encoding)(errors="surrogatepass")
        return start.removeprefix(codecs.BOM_UTF8)

    def _encode(self, block: bytes, *, final: bool = False) -> bytes:
        if self._decoder is None:
            return block
        try:
            return self._decoder.decode(block, final).encode(errors="surrogatepass")
        except UnicodeDecodeError:
            self._decoder.reset()
            return b"\xff"


def utf8_blocks(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same text in UTF-8."""
    encoder = Utf8Encoder()
    for block in blocks:
        yield encoder.feed(block)
    yield encoder.finish()


def start_in_utf8(start: bytes) -> bytes:
    """The first bytes of an input as UTF-8, if they are text; what is cut at the end isn't said."""
    encoder = Utf8Encoder()
    return encoder.feed(start) or encoder.finish()  # of less than tells the encoding
