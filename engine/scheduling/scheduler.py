"""Which sequences run in the next micro-batch, and with how many tokens.

Continuous batching: a sequence joins and leaves between any two steps. Decodes come first, then
prefill chunks up to the token budget. Within a micro-batch those come first that have waited
longest. With a prefix cache a sequence that hasn't begun waits for another that is computing what
both begin with.

Where more wait than may begin, those with the most new tokens to come begin first: a long one that
begins last would end alone, in batches of one (longest processing time first: Graham, "Bounds on
Multiprocessing Timing Anomalies", 1969). Nothing starves: none is overtaken more than
`max_num_seqs` times.

A sequence that finds no slot for its next token takes those of the last to arrive, which keeps its
tokens and is recomputed later: vLLM's preemption by recomputing (Kwon et al., "Efficient Memory
Management for Large Language Models with PagedAttention", section 4.5). It is never taken from by a
younger one, so the oldest always goes on, and after it the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice, takewhile

from engine.requests.sequence import Sequence
from engine.scheduling.prefix_cache import PrefixCache
from engine.scheduling.slot_ranges import SlotRanges
from engine.scheduling.slots import SlotAllocator

__all__ = ["Scheduler"]


class Scheduler:
    """Sequences that wait, run, or are part of a micro-batch in flight.

    :param num_groups: micro-batches that may be in flight at once; sequences are spread over them
    :param prefixes: what of `allocator` is held; None: sequences share nothing
    """

    def __init__(
        self,
        allocator: SlotAllocator,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        num_groups: int = 1,
        use_cache: bool = True,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.allocator = allocator
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.num_groups = num_groups
        self.use_cache = use_cache
        self.prefixes = prefixes
        self._ranges = SlotRanges(allocator, prefixes, max_num_seqs)
        # Those that were preempted in front, then the others; both in the order of arrival. So who
        # stands further in front was overtaken as often as those behind it, or more.
        self.waiting: deque[Sequence] = deque()
        # Ordered by when a sequence was last scheduled, the longest ago in front.
        self._running: dict[int, Sequence] = {}
        self._given_back: list[Sequence] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def running(self) -> Iterator[Sequence]:
        return iter(self._running.values())

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Take out a sequence that isn't in flight, and free its slots; False if not running."""
        if self._running.pop(sequence.number, None) is None:
            self.waiting.remove(sequence)
            return False
        if self.use_cache:
            self._ranges.close(sequence)
        return True

    def admit(self) -> list[Sequence]:
        """Let waiting sequences in, as far as there are places and slots."""
        admitted = []
        while self.waiting and len(self._running) < self.max_num_seqs:
            place = self._next_place()
            sequence = self.waiting[place]
            if self.use_cache and not self._ranges.open(sequence):
                break  # Others wait too, or one that needs many slots would never get them.
            del self.waiting[place]
            for overtaken in islice(self.waiting, place):
                overtaken.num_overtaken += 1
            self._running[sequence.number] = sequence
            sequence.is_preempted = False
            admitted.append(sequence)
        return admitted

    def _next_place(self) -> int:
        """Where in `waiting` the sequence is that begins next: the longest of the first ones."""
        first = self.waiting[0]
        if first.is_preempted or first.num_overtaken >= self.max_num_seqs:
            return 0
        candidates = list(islice(self.waiting, self.max_num_seqs))
        return max(range(len(candidates)), key=lambda i: candidates[i].num_to_come)

    def take_preempted(self) -> list[Sequence]:
        """Those preempted since the last call, for whatever else is kept for them."""
        preempted, self._given_back = self._given_back, []
        return preempted

    def _can_run(self, sequence: Sequence) -> bool:
        if sequence.in_flight:
            return False
        if self.prefixes is None or sequence.num_cached > 0:
            return True
        return not self.prefixes.must_wait(sequence)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The next micro-batch: sequences and how many pending tokens of each; all now in flight.

        At most `max_batch_tokens` tokens, unless a single sequence has more and there is no
        cache to keep a part of them in.
        """
        places = -(-len(self._running) // self.num_groups)
        ready = list(islice(filter(self._can_run, self._running.values()), places))
        # Stable: decodes, then prompts that were begun, lest they end last and alone, then others.
        ready.sort(key=lambda s: (s.num_pending > 1, s.num_cached == 0))
        work: list[tuple[Sequence, int]] = []
        budget = self.max_batch_tokens
        for sequence in ready:
            if budget <= 0:
                break
            # One before it may have preempted it, or moved what it was about to copy.
            if sequence.number not in self._running or not self._can_run(sequence):
                continue
            if not self._has_room(sequence):
                continue
            if self.prefixes is not None and sequence.num_cached == 0:
                self.prefixes.reuse(sequence)
            if self.use_cache:
                count = min(sequence.num_pending, budget)
            else:
                count = sequence.num_tokens
                if work and count > budget:
                    break
            budget -= count
            sequence.in_flight = True
            work.append((sequence, count))
        for sequence, _ in work:
            self._running[sequence.number] = self._running.pop(sequence.number)
        return work

    def _has_room(self, sequence: Sequence) -> bool:
        """See that a sequence has slots for its tokens, if need be those of younger ones."""
        if not self.use_cache:
            return True
        while not self._ranges.grow(sequence):
            younger = [s for s in self._running.values() if s.number > sequence.number]
            idle = [s for s in younger if not s.in_flight]
            if younger and not idle:
                return False  # Once they are back it comes first, for it has waited longest.
            victim = max(idle, key=lambda s: s.number, default=sequence)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Let a sequence that isn't in flight wait again, in front of all that never ran."""
        del self._running[sequence.number]
        self._ranges.close(sequence)
        sequence.num_cached = 0
        sequence.is_preempted = True
        self._given_back.append(sequence)
        older = takewhile(lambda s: s.is_preempted and s.number < sequence.number, self.waiting)
        self.waiting.insert(sum(1 for _ in older), sequence)

    def recompute(self, sequence: Sequence) -> None:
        """Let a running sequence, not in flight, be computed from its start: its cache is void."""
        if self.use_cache:
            self._preempt(sequence)

    def computed(self, sequence: Sequence, count: int) -> None:
        """Note that a sequence's micro-batch came back with `count` of its tokens."""
        sequence.in_flight = False
        if self.use_cache:
            sequence.num_cached += count
            sequence.copy = None
        if self.prefixes is not None:
            self.prefixes.computed(sequence)

    def take_back(self, sequence: Sequence) -> None:
        """Note that a sequence's micro-batch failed, so that its tokens are to run again."""
        sequence.in_flight = False
        if sequence.copy is not None:
            # Some stages may not have made it, and its source may be gone.
            sequence.copy = None
            sequence.num_cached = 0
