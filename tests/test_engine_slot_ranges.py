"""Ranges grow, move and are given back, and what a sequence reads in its slots is what it wrote.

The stages are a list here: one entry per slot, the tokens up to that whose K and V lie there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.requests.sequence import Sequence
from engine.scheduling.prefix_cache import PrefixCache
from engine.scheduling.round import Round
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.slot_ranges import SlotRanges
from engine.scheduling.slots import SlotAllocator
from queue_api.wire.schemas import SamplingParams

SLOTS = 240
Content = tuple[int, ...] | None


def new_sequence(number: int, prompt: list[int], new: int) -> Sequence:
    sampling = SamplingParams(max_tokens=new)
    return Sequence.create(
        f"k{number}", number, prompt, [], sampling, seed=0, added_at=0.0, num_stages=1
    )


@dataclass
class Flight:
    round: Round
    fails: bool


@dataclass
class World:
    """A scheduler, its stages' memory, and sequences whose tokens follow from number and place."""

    num_seqs: int
    budget: int
    num_groups: int
    shares: bool
    lengths: dict[int, int] = field(default_factory=dict)
    """When a sequence ends, in tokens, by its number."""
    failures: deque[bool] = field(default_factory=deque)
    """Whether the next micro-batches fail; none does when there is no more."""
    fails_to_move: bool = False
    """Whether the next micro-batch with a move fails."""

    def __post_init__(self) -> None:
        self.allocator = SlotAllocator(SLOTS)
        self.scheduler = Scheduler(
            self.allocator,
            max_num_seqs=self.num_seqs,
            max_batch_tokens=self.budget,
            num_groups=self.num_groups,
            prefixes=PrefixCache(self.allocator) if self.shares else None,
        )
        self.memory: list[Content] = [None] * SLOTS
        self.in_flight: deque[Flight] = deque()
        self.finished: dict[int, list[int]] = {}
        self.num_preempted = self.num_moved = 0

    def round(self) -> None:
        scheduler = self.scheduler
        scheduler.admit()
        while len(self.in_flight) < self.num_groups:
            ranges = {s.number: s.first_slot for s in scheduler.running if s.in_flight}
            work = scheduler.schedule()
            self.check_preempted(scheduler.take_preempted())
            self.check_ranges()
            assert all(
                s.first_slot == ranges[s.number] for s in scheduler.running if s.number in ranges
            ), "what is in flight is never moved"
            if not work:
                break
            self.submit(Round.pack(work))
        if self.in_flight:
            self.collect(self.in_flight.popleft())

    def check_preempted(self, preempted: list[Sequence]) -> None:
        self.num_preempted += len(preempted)
        for sequence in preempted:
            assert not sequence.in_flight
            # Whoever was there before it goes on; alone, it goes on by itself.
            running = [s.number for s in self.scheduler.running]
            assert not running or min(running) < sequence.number
        waiting = [s.number for s in self.scheduler.waiting if s.is_preempted]
        assert waiting == sorted(waiting)
        kinds = [s.is_preempted for s in self.scheduler.waiting]
        assert kinds == sorted(kinds, reverse=True), "those preempted wait in front"

    def check_ranges(self) -> None:
        taken: set[int] = set()
        for sequence in self.scheduler.running:
            own = range(sequence.first_slot, sequence.first_slot + sequence.num_slots)
            assert sequence.num_cached <= len(own) <= sequence.capacity
            assert 0 <= own.start < own.stop <= SLOTS
            assert taken.isdisjoint(own), "no two sequences have a slot in common"
            taken.update(own)

    def submit(self, packed: Round) -> None:
        """Do with the memory what a stage does, or half of it if the batch fails."""
        batch = packed.batch
        fails = self.failures.popleft() if self.failures else False
        if self.fails_to_move and any(copy.is_move for copy in batch.copies):
            fails, self.fails_to_move = True, False
        for copy in batch.copies:
            self.num_moved += copy.is_move
            source, destination = (
                range(first, first + copy.length) for first in (copy.source, copy.destination)
            )
            assert not set(source) & set(destination)
            for a, b in zip(source, destination, strict=True):
                self.memory[b] = None if fails else self.memory[a]
        for segment, sequence in zip(batch.segments, packed.sequences, strict=True):
            tokens = tuple(sequence.token_ids[: sequence.num_tokens].tolist())
            assert segment.past + segment.count <= sequence.num_slots
            for place in range(segment.past + segment.count):
                slot = segment.first_slot + place
                if place >= segment.past:
                    self.memory[slot] = None if fails else tokens[: place + 1]
                elif not fails:
                    assert self.memory[slot] == tokens[: place + 1], "it reads what it wrote"
        self.in_flight.append(Flight(packed, fails))

    def collect(self, flight: Flight) -> None:
        segments = flight.round.batch.segments
        for segment, sequence in zip(segments, flight.round.sequences, strict=True):
            if flight.fails:
                self.scheduler.take_back(sequence)
            else:
                self.scheduler.computed(sequence, segment.count)
            if sequence.is_cancelled:
                self.scheduler.remove(sequence)
            elif not flight.fails and sequence.num_pending == 0:
                sequence.append((7 * sequence.number + sequence.num_tokens) % 5)
                if sequence.num_tokens == self.lengths[sequence.number]:
                    self.scheduler.remove(sequence)
                    self.finished[sequence.number] = sequence.generated()

    def cancel(self, sequence: Sequence) -> None:
        sequence.is_cancelled = True
        if not sequence.in_flight:
            self.scheduler.remove(sequence)


TEXTS = st.lists(
    st.tuples(
        st.integers(0, 6),  # rounds before it arrives
        st.integers(1, 90),  # prompt
        st.integers(1, 150),  # max_tokens
        st.integers(1, 150),  # tokens at which it ends, if those are fewer
        st.booleans(),  # which beginning
    ),
    max_size=14,
)


@settings(max_examples=200, deadline=None)
@given(
    num_seqs=st.integers(1, 8),
    budget=st.integers(0, 60),
    num_groups=st.integers(1, 3),
    shares=st.booleans(),
    texts=TEXTS,
    cancels=st.dictionaries(st.integers(0, 13), st.integers(0, 120), max_size=4),
    failures=st.lists(st.sampled_from([False, False, False, True]), max_size=40),
)
def test_every_text_finishes_and_reads_what_it_wrote(
    num_seqs, budget, num_groups, shares, texts, cancels, failures
) -> None:
    world = World(num_seqs, num_seqs + budget, num_groups, shares, failures=deque(failures))
    added: list[Sequence] = []
    cancelled: set[int] = set()
    arrivals = deque(texts)
    wait = arrivals[0][0] if arrivals else 0
    for step in range(20_000):
        while arrivals and wait <= 0:
            _, prompt, new, end, which = arrivals.popleft()
            number = len(added)
            world.lengths[number] = prompt + min(new, end)
            added.append(new_sequence(number, [1 if which else 2] * (prompt - 1) + [4], new))
            world.scheduler.add(added[-1])
            wait = arrivals[0][0] if arrivals else 0
        wait -= 1
        for number, when in cancels.items():
            if when == step and number < len(added) and number not in world.finished:
                cancelled.add(number)
                world.cancel(added[number])
        world.round()
        if not (
            arrivals or world.in_flight or world.scheduler.waiting or any(world.scheduler.running)
        ):
            break
    else:
        pytest.fail("no end")
    assert set(world.finished) | cancelled == set(range(len(added)))
    for number, generated in world.finished.items():
        prompt = added[number].num_prompt
        assert generated == [(7 * number + n) % 5 for n in range(prompt, world.lengths[number])]
    if world.scheduler.prefixes is not None:
        world.scheduler.prefixes.clear()
    assert world.allocator.num_free == SLOTS
    assert world.allocator.allocate(SLOTS) == 0


def run(world: World, texts: list[tuple[int, int]], end: int) -> list[int]:
    """Run texts of (prompt, max_tokens) that end after `end` new ones; how many ran, by round."""
    for number, (prompt, new) in enumerate(texts):
        world.lengths[number] = prompt + min(new, end)
        world.scheduler.add(new_sequence(number, [number % 5] * prompt, new))
    running = []
    while len(world.finished) < len(texts):
        world.round()
        running.append(world.scheduler.num_running)
        assert len(running) < 10_000
    return running


@pytest.mark.parametrize("shares", [True, False])
def test_texts_that_end_early_run_together_where_full_reservation_would_not_let_them(
    shares: bool,
) -> None:
    world = World(num_seqs=8, budget=64, num_groups=1, shares=shares)
    running = run(world, [(10, 200)] * 8, end=12)
    assert max(running) == 8  # at full length, one would fit at a time
    assert world.num_preempted == 0


def test_nobody_copies_from_where_a_text_moves_until_it_is_there() -> None:
    world = World(num_seqs=8, budget=1, num_groups=3, shares=True, fails_to_move=True)
    sequences = [
        new_sequence(0, [1] * 40, 100),
        new_sequence(1, [2] * 40, 100),
        new_sequence(2, [1] * 50, 100),
    ]
    world.lengths = dict.fromkeys(range(3), 130)
    for sequence in sequences[:2]:
        world.scheduler.add(sequence)
    while (
        sequences[0].in_flight
        or sequences[0].num_tokens <= sequences[0].num_slots
        or not any(world.scheduler.running)
    ):
        world.round()
    # Its beginning is the one that moves, with 1 right behind it.
    world.scheduler.add(sequences[2])
    while len(world.finished) < 3:
        world.round()
    assert not world.fails_to_move
    assert world.num_moved


def test_what_a_preempted_text_left_is_known_apart_from_what_it_has_again() -> None:
    allocator = SlotAllocator(SLOTS)
    prefixes = PrefixCache(allocator)
    ranges = SlotRanges(allocator, prefixes, 8)
    preempted, follower = (new_sequence(number, [1] * 40, 10) for number in range(2))
    for _ in range(2):
        preempted.num_cached = 0
        assert ranges.open(preempted)
        preempted.num_cached = 40
        prefixes.computed(preempted)
        first_slot = preempted.first_slot
        if not prefixes.num_retained:
            ranges.close(preempted)
    assert prefixes.evict()
    assert ranges.open(follower)
    prefixes.reuse(follower)
    assert follower.copy is not None
    assert (follower.copy.source, follower.copy.length) == (first_slot, 39)
    ranges.close(preempted)
    ranges.close(follower)
    prefixes.clear()
    assert allocator.num_free == SLOTS


def test_nothing_moves_where_there_are_slots_for_all_at_full_length() -> None:
    world = World(num_seqs=4, budget=64, num_groups=2, shares=False)
    run(world, [(10, 50)] * 12, end=50)
    assert world.num_moved == world.num_preempted == 0


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_a_text_that_fits_alone_finishes_among_others_as_large(num_groups: int) -> None:
    world = World(num_seqs=6, budget=64, num_groups=num_groups, shares=True)
    run(world, [(20, SLOTS - 20)] * 6, end=SLOTS)
    assert sorted(world.finished) == list(range(6))
    assert list(world.finished) == sorted(world.finished), "the oldest is never held up"
    assert world.num_preempted
    assert world.num_moved


def test_what_was_preempted_is_not_admitted_at_once_only_to_be_preempted_again() -> None:
    world = World(num_seqs=8, budget=64, num_groups=1, shares=False)
    run(world, [(10, 100)] * 8, end=100)
    assert 0 < world.num_preempted <= 8, "once each at most"
