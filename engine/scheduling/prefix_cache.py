"""Which tokens' K and V the pool holds, so that a sequence with the same beginning copies them.

The mechanism is vLLM's automatic prefix caching (https://docs.vllm.ai/en/latest/design/prefix_caching):
tokens in blocks of `BLOCK`, each block known by a hash chained over all tokens before it. Here a
sequence has one contiguous range of slots, so a block isn't shared but copied: bytes, no FLOPs. So
sharing needn't end with a block: of those who hold the last one, the copy is of whoever goes on
alike the longest.

Why a copy never reads what another sequence has overwritten: a source is looked up when the batch
that copies is made, and is then held by a running sequence or retained. Should its slots get
another owner right afterwards, that one writes behind the copy, for each stage makes a batch's
copies in order before it runs the batch, and runs batches in order. Only tokens whose batch has
come back are known here, so one that failed leaves nothing behind: a sequence that moves is no
source meanwhile.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.batch import CacheCopy
from engine.requests.sequence import Sequence
from engine.scheduling.branches import Branches
from engine.scheduling.slots import SlotAllocator

__all__ = ["BLOCK", "PrefixCache"]

BLOCK = 16
"""Tokens; a shared beginning shorter than this isn't found."""
WORTH_WAITING = 2
"""Tokens short of a block that a sequence waits for, if another is about to compute them: on a CPU
they take longer than its own token does, which the wait for one round costs."""


@dataclass(eq=False, slots=True)
class _Range:
    """Slots of one sequence, running or ended. One that was preempted may have several."""

    number: int
    """Of the range, not of the sequence."""
    first_slot: int
    token_ids: npt.NDArray[np.int64]
    is_long: bool = False
    """Its keys are rotated otherwise than those of one that isn't."""
    num_written: int = 0
    """Tokens from the start whose K and V are in every stage's pool."""
    hashes: list[bytes] = field(default_factory=list)
    """One per full block, as far as they were needed."""
    num_known: int = 0
    """Blocks from the start that the index leads to."""
    tail: tuple[int, bytes] | None = None
    """Number of a block and the prompt's last tokens, which begin it, if the index leads there."""
    claimed_tail: tuple[int, bytes] | None = None
    """The same of one that is about to be computed."""
    tail_end: int = 0
    """Tokens from the start up to the end of that."""
    is_claiming: bool = False
    """It is about to compute what it claims, and waits for nobody."""

    def hash_blocks(self, num_tokens: int) -> list[bytes]:
        """The hashes of all full blocks in the first `num_tokens`."""
        num_blocks = num_tokens // BLOCK
        for i in range(len(self.hashes), num_blocks):
            block = self.token_ids[i * BLOCK : (i + 1) * BLOCK].tobytes()
            before = self.hashes[-1] if self.hashes else b"long" * self.is_long
            # Of a length at which nobody makes two sequences that share one.
            self.hashes.append(hashlib.blake2b(before + block, digest_size=32).digest())
        return self.hashes[:num_blocks]

    @property
    def tail_key(self) -> bytes:
        """What leads to the tail, in place of a block's hash."""
        return b"tail %d" % self.number

    def tokens_of(self, block: int, end: int) -> bytes:
        """The block's tokens, as far as they are before `end`."""
        return self.token_ids[block * BLOCK : min((block + 1) * BLOCK, end)].tobytes()


class PrefixCache:
    """Slots of running sequences, and of ended ones for as long as nobody else needs them.

    A sequence that was preempted counts as ended.

    Invariants: the index leads to block `i` of a range exactly for `i < num_known`, and
    `num_known * BLOCK <= num_written`; a claimed block is one that its owner, which runs, is going
    to compute; every range in the allocator is a running sequence's or retained.
    """

    def __init__(self, allocator: SlotAllocator) -> None:
        self._allocator = allocator
        self._num_ranges = 0
        self._running: dict[int, _Range] = {}
        """By the number of the sequence."""
        # The least recently used in front.
        self._retained: OrderedDict[int, _Range] = OrderedDict()
        self._holders: dict[bytes, dict[int, _Range]] = {}
        """By a block's hash, then by the number of the range."""
        self._claims: dict[bytes, int] = {}
        """By a block's hash: the number of the range whose sequence is about to compute it."""
        self._held_behind = Branches()
        """What leads to a holder, but for first blocks."""
        self._claimed_behind = Branches()

    @property
    def num_retained(self) -> int:
        """Slots of ended sequences."""
        return sum(ended.num_written for ended in self._retained.values())

    def hold(self, sequence: Sequence) -> None:
        """Take note of the range that a sequence has got."""
        self._num_ranges += 1
        self._running[sequence.number] = _Range(
            self._num_ranges, sequence.first_slot, sequence.token_ids, sequence.is_long
        )

    def moved(self, sequence: Sequence) -> None:
        """Note that a sequence gets another range, which its next batch fills.

        Until that is back others wait for its blocks, as they do for those not computed yet.
        """
        own = self._running[sequence.number]
        self._forget(own)
        own.first_slot, own.num_written, own.num_known = sequence.first_slot, 0, 0
        for number, block in enumerate(own.hashes):
            if block not in self._holders:
                self._claim(own, number, block)

    def free(self, sequence: Sequence) -> None:
        """Take a range back; it is retained if it holds what no other does."""
        freed = self._running.pop(sequence.number)
        for number, block in enumerate(freed.hashes):
            self._end_claim(freed, number, block)
        self._end_tail_claim(freed)
        known = freed.hashes[: freed.num_known]
        if all(len(self._holders[block]) > 1 for block in known):
            self._drop(freed)
            return
        self._allocator.shrink(freed.first_slot, freed.num_written)
        self._retained[freed.number] = freed

    def must_wait(self, sequence: Sequence) -> bool:
        """Whether another sequence is about to compute what this one, not begun yet, needs next.

        If not, this one is about to compute the rest of its blocks itself. None waits for
        one that waits: of those that begin alike, all know the same blocks, so all name one owner.
        """
        if sequence.scores_prompt:
            return False
        own = self._running[sequence.number]
        if own.is_claiming:
            return False
        blocks = own.hash_blocks(sequence.num_tokens)
        num_held = self._num_held(blocks)
        usable = sequence.num_tokens - 1  # one token is computed in any case
        if num_held < usable // BLOCK and blocks[num_held] in self._claims:
            return True
        if 0 < num_held * BLOCK < usable:
            behind, tokens = blocks[num_held - 1], own.tokens_of(num_held, usable)
            claimed, _ = self._claimed_behind.closest(behind, tokens)
            if claimed - self._held_behind.closest(behind, tokens)[0] >= WORTH_WAITING:
                return True
        own.is_claiming = True
        for number in range(num_held, len(blocks)):
            self._claim(own, number, blocks[number])
        self._claim_tail(own, sequence.num_tokens)
        return False

    def reuse(self, sequence: Sequence) -> None:
        """Let one that begins copy what another holds of it, if any; all but its last token."""
        if sequence.scores_prompt:
            return
        own = self._running[sequence.number]
        limit = sequence.num_tokens - 1
        blocks = own.hash_blocks(limit)
        num_held = self._num_held(blocks)
        if num_held == 0:
            return
        begin, last = num_held * BLOCK, blocks[num_held - 1]
        _, key = self._held_behind.closest(last, own.tokens_of(num_held, limit))
        holder = next(iter(self._holders[key or last].values()))
        if holder.number in self._retained:
            self._retained.move_to_end(holder.number)
        end = min(limit, holder.num_written)
        differs = holder.token_ids[begin:end] != sequence.token_ids[begin:end]
        length = begin + int(differs.argmax()) if differs.any() else end
        sequence.copy = CacheCopy(holder.first_slot, own.first_slot, length)
        sequence.num_cached = length

    def computed(self, sequence: Sequence) -> None:
        """Note that the sequence's first `num_cached` tokens are in every stage's pool."""
        own = self._running[sequence.number]
        own.num_written = sequence.num_cached
        blocks = own.hash_blocks(own.num_written)
        for number in range(own.num_known, len(blocks)):
            self._hold(own, number, blocks[number])
            self._end_claim(own, number, blocks[number])
        own.num_known = len(blocks)
        if own.tail is not None and own.tail[0] < own.num_known:
            self._forget_tail(own)
        if own.claimed_tail is not None and own.num_written >= own.tail_end:
            self._end_tail_claim(own)
            if tokens := own.tokens_of(own.num_known, own.num_written):
                self._hold_tail(own, tokens)

    def clear(self) -> None:
        """Forget all ended sequences."""
        while self.evict():
            pass

    def evict(self) -> bool:
        """Free the slots of the least recently used ended sequence; False if there is none."""
        if not self._retained:
            return False
        self._drop(self._retained.popitem(last=False)[1])
        return True

    def evict_at(self, first_slot: int) -> bool:
        """Free the slots of the ended sequence that begins there; False if there is none."""
        for ended in self._retained.values():
            if ended.first_slot == first_slot:
                self._drop(self._retained.pop(ended.number))
                return True
        return False

    def _num_held(self, blocks: list[bytes]) -> int:
        """How many of a sequence's blocks, from the first on, are held."""
        for i, block in enumerate(blocks):
            if block not in self._holders:
                return i
        return len(blocks)

    def _drop(self, dropped: _Range) -> None:
        """Take a range out of the index, and free its slots."""
        self._forget(dropped)
        self._allocator.free(dropped.first_slot)

    def _forget(self, known: _Range) -> None:
        """Take a range out of the index."""
        for number, block in enumerate(known.hashes[: known.num_known]):
            holders = self._holders[block]
            del holders[known.number]
            if not holders:
                del self._holders[block]
                self._note(self._held_behind.remove, known, number, block)
        self._forget_tail(known)

    def _hold(self, own: _Range, number: int, block: bytes) -> None:
        holders = self._holders.setdefault(block, {})
        if not holders:
            self._note(self._held_behind.add, own, number, block)
        holders[own.number] = own

    def _hold_tail(self, own: _Range, tokens: bytes) -> None:
        own.tail = own.num_known, tokens
        self._holders[own.tail_key] = {own.number: own}
        self._held_behind.add(own.hashes[own.num_known - 1], tokens, own.tail_key)

    def _forget_tail(self, own: _Range) -> None:
        if own.tail is not None:
            number, tokens = own.tail
            del self._holders[own.tail_key]
            self._held_behind.remove(own.hashes[number - 1], tokens, own.tail_key)
            own.tail = None

    def _claim(self, own: _Range, number: int, block: bytes) -> None:
        if block not in self._claims:
            self._claims[block] = own.number
            self._note(self._claimed_behind.add, own, number, block)

    def _end_claim(self, own: _Range, number: int, block: bytes) -> None:
        if self._claims.get(block) == own.number:
            del self._claims[block]
            self._note(self._claimed_behind.remove, own, number, block)

    def _claim_tail(self, own: _Range, num_tokens: int) -> None:
        number = num_tokens // BLOCK
        if number and (tokens := own.tokens_of(number, num_tokens)):
            own.claimed_tail, own.tail_end = (number, tokens), num_tokens
            self._claimed_behind.add(own.hashes[number - 1], tokens, own.tail_key)

    def _end_tail_claim(self, own: _Range) -> None:
        if own.claimed_tail is not None:
            number, tokens = own.claimed_tail
            self._claimed_behind.remove(own.hashes[number - 1], tokens, own.tail_key)
            own.claimed_tail = None

    @staticmethod
    def _note(
        change: Callable[[bytes, bytes, bytes], None], own: _Range, number: int, block: bytes
    ) -> None:
        """Change what leads to one of the range's blocks."""
        if number:
            change(own.hashes[number - 1], own.tokens_of(number, (number + 1) * BLOCK), block)
