"""Digests of rows: of how a row is written, and of what it says in any format."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

__all__ = ["MODULUS", "content_digest", "line_digest", "short_of"]

MODULUS = 2**128


def content_digest(row: int, columns: Mapping[str, Any]) -> int:
    """128 bits that stand for a row's number, what made it, and its text or error: whatever it is
    written in, wherever and how fast it was made.

    Digests of rows add up, modulo MODULUS, to one of them all that doesn't depend on their order:
    M. Bellare and D. Micciancio, A New Paradigm for Collision-Free Hashing, 1997 (AdHash). At this
    size it tells of accidents, not of an attacker's work.
    """
    get = columns.get
    said = (
        f"{row}\0{get('fingerprint') or ''}\0{get('finish_reason') or ''}\0{get('error') or ''}\0"
        f"{get('text') or ''}"
    )
    digest = hashlib.blake2b(said.encode(errors="surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest, "big")


def short_of(content: int) -> int:
    """64 bits, never 0, of a content digest."""
    return content >> 64 or 1


def line_digest(line: bytes) -> int:
    """64 bits, never 0, that stand for a line without its end."""
    return int.from_bytes(hashlib.blake2b(line.rstrip(b"\n"), digest_size=8).digest(), "big") or 1
