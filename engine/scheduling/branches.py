"""What stands behind blocks of tokens, in order, so that the longest match is a neighbour."""

from __future__ import annotations

from bisect import bisect_left, insort

__all__ = ["Branches"]

TOKEN_BYTES = 8


class Branches:
    """Up to a block of tokens that follow a block, each with a key that leads to who has them."""

    def __init__(self) -> None:
        self._behind: dict[bytes, list[tuple[bytes, bytes]]] = {}
        """By a block's hash: tokens as int64, and the key; sorted."""

    def add(self, block: bytes, tokens: bytes, key: bytes) -> None:
        """Note that these tokens follow the block."""
        insort(self._behind.setdefault(block, []), (tokens, key))

    def remove(self, block: bytes, tokens: bytes, key: bytes) -> None:
        """Take back what was added."""
        branches = self._behind[block]
        del branches[bisect_left(branches, (tokens, key))]
        if not branches:
            del self._behind[block]

    def closest(self, block: bytes, tokens: bytes) -> tuple[int, bytes]:
        """How many of these tokens follow the block, and the key of what has them."""
        branches = self._behind.get(block, ())
        place = bisect_left(branches, (tokens,))
        best = 0, b""
        for others, key in branches[max(0, place - 1) : place + 1]:
            best = max(best, (_num_common(tokens, others), key))
        return best


def _num_common(first: bytes, second: bytes) -> int:
    """Of tokens, from the start on."""
    length = min(len(first), len(second))
    differing = int.from_bytes(first[:length], "big") ^ int.from_bytes(second[:length], "big")
    return (length - (differing.bit_length() + 7) // 8) // TOKEN_BYTES
