"""The scheduler keeps its budgets and lets nobody starve, whoever arrives, ends or is cancelled."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.requests.sequence import Sequence
from engine.scheduling.prefix_cache import PrefixCache
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.slots import SlotAllocator
from queue_api.wire.schemas import SamplingParams

SLOTS = 48


def new_sequence(number: int, prompt: int, new: int) -> Sequence:
    sampling = SamplingParams(max_tokens=new)
    return Sequence.create(
        f"k{number}", number, [0] * prompt, [], sampling, seed=0, added_at=0.0, num_stages=1
    )


class Drive:
    """Runs a scheduler with made-up tokens, and checks every micro-batch."""

    def __init__(self, num_seqs: int, budget: int, num_groups: int, how: str) -> None:
        allocator = SlotAllocator(SLOTS)
        self.scheduler = Scheduler(
            allocator,
            max_num_seqs=num_seqs,
            max_batch_tokens=budget,
            num_groups=num_groups,
            use_cache=how != "no cache",
            prefixes=PrefixCache(allocator) if how == "shared" else None,
        )
        self.in_flight: list[list[tuple[Sequence, int]]] = []
        self.last_turn: dict[int, int] = {}
        self.turn = 0
        self.admitted: list[int] = []
        self.finished: list[int] = []
        self.cancelled: set[int] = set()

    def round(self) -> bool:
        """Fill the pipeline, bring the oldest micro-batch back; False if there is nothing to do."""
        scheduler = self.scheduler
        self.admitted += [
            sequence.number
            for sequence in scheduler.admit()
            if sequence.number not in self.admitted  # it may be preempted and come back
        ]
        assert scheduler.num_running <= scheduler.max_num_seqs
        while len(self.in_flight) < scheduler.num_groups and (work := scheduler.schedule()):
            self.check(work)
            self.in_flight.append(work)
        if not self.in_flight:
            return False
        for sequence, count in self.in_flight.pop(0):
            scheduler.computed(sequence, count)
            done = sequence.num_tokens if not scheduler.use_cache else sequence.num_cached
            if sequence.is_cancelled:
                scheduler.remove(sequence)
            elif done == sequence.num_tokens:
                sequence.append(1)
                if sequence.num_tokens == sequence.capacity:
                    scheduler.remove(sequence)
                    self.finished.append(sequence.number)
        return True

    def check(self, work: list[tuple[Sequence, int]]) -> None:
        numbers = [sequence.number for sequence, _ in work]
        flying = [sequence.number for batch in self.in_flight for sequence, _ in batch]
        assert len(set(numbers + flying)) == len(numbers) + len(flying)
        total = sum(count for _, count in work)
        assert total <= self.scheduler.max_batch_tokens or (
            not self.scheduler.use_cache and len(work) == 1
        )
        if self.scheduler.use_cache:
            assert all(0 < count <= sequence.num_pending for sequence, count in work)
        if self.scheduler.prefixes is not None:
            return  # some wait for others, and for longer
        if self.scheduler.use_cache:
            kinds = [sequence.num_pending > 1 for sequence, _ in work]
            assert kinds == sorted(kinds), "decodes come first"
        self.turn += 1
        for number in numbers:
            self.last_turn[number] = self.turn
        for sequence in self.scheduler.running:
            waited = self.turn - self.last_turn.setdefault(sequence.number, self.turn)
            # Each micro-batch takes the longest waiting first and moves at least one of them on.
            assert waited <= 2 * self.scheduler.max_num_seqs + self.scheduler.num_groups


@settings(max_examples=150, deadline=None)
@given(
    num_seqs=st.integers(1, 6),
    extra=st.integers(0, 12),
    num_groups=st.integers(1, 3),
    how=st.sampled_from(["no cache", "cache", "shared"]),
    arrivals=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 30), st.integers(1, 12)), max_size=16
    ),
    cancels=st.sets(st.tuples(st.integers(0, 15), st.integers(0, 40)), max_size=5),
)
def test_everyone_finishes_within_the_budgets(
    num_seqs, extra, num_groups, how, arrivals, cancels
) -> None:
    drive = Drive(num_seqs, num_seqs + extra, num_groups, how)
    sequences: list[Sequence] = []
    pending = list(arrivals)
    step = 0
    while True:
        while pending and pending[0][0] <= step % 6:
            _, prompt, new = pending.pop(0)
            sequences.append(new_sequence(len(sequences), prompt, new))
            drive.scheduler.add(sequences[-1])
        for number, when in cancels:
            if when == step and number < len(sequences) and number not in drive.finished:
                cancel(drive, sequences[number])
        busy = drive.round()
        step += 1
        if not busy and not pending:
            break
        assert step < 5000
    assert set(drive.finished) | drive.cancelled == set(range(len(arrivals)))
    for number in drive.admitted:
        before = drive.admitted[: drive.admitted.index(number)]
        assert sum(other > number for other in before) <= num_seqs, "overtaken so often at most"
    assert drive.scheduler.num_running == 0
    if drive.scheduler.prefixes is not None:
        drive.scheduler.prefixes.clear()
    assert drive.scheduler.allocator.num_free == SLOTS


def cancel(drive: Drive, sequence: Sequence) -> None:
    if sequence.number in drive.cancelled:
        return
    drive.cancelled.add(sequence.number)
    sequence.is_cancelled = True
    if not sequence.in_flight:
        drive.scheduler.remove(sequence)


def test_a_long_text_is_not_overtaken_for_want_of_slots() -> None:
    drive = Drive(num_seqs=8, budget=64, num_groups=1, how="cache")
    for number, (prompt, new) in enumerate([(20, 10), (30, 10), (1, 1)]):
        drive.scheduler.add(new_sequence(number, prompt, new))
    drive.round()
    assert drive.admitted == [0]  # 1 needs 40 slots, 18 are free; 2 would fit
    while drive.round():
        pass
    assert drive.admitted == [0, 1, 2]


def test_of_those_that_wait_the_longest_begin_first() -> None:
    drive = Drive(num_seqs=4, budget=64, num_groups=1, how="no cache")
    for number in range(4):
        drive.scheduler.add(new_sequence(number, 3, 5))
    drive.round()
    for number, new in enumerate([2, 9, 4, 9], start=4):
        drive.scheduler.add(new_sequence(number, 3, new))
    while drive.round():
        pass
    assert drive.admitted == [0, 1, 2, 3, 5, 7, 6, 4]


def test_a_short_text_is_overtaken_a_bounded_number_of_times() -> None:
    drive = Drive(num_seqs=4, budget=64, num_groups=1, how="no cache")
    drive.scheduler.add(new_sequence(0, 3, 6))
    drive.round()
    drive.scheduler.add(new_sequence(1, 3, 1))
    number = 2
    while 1 not in drive.admitted:
        for _ in range(4):
            drive.scheduler.add(new_sequence(number, 3, 6))  # longer ones keep coming
            number += 1
        drive.round()
        assert number < 1000
    assert drive.admitted.index(1) <= 1 + 4


@pytest.mark.parametrize("num_groups", [2, 3])
def test_sequences_are_spread_over_the_micro_batches(num_groups: int) -> None:
    drive = Drive(num_seqs=6, budget=48, num_groups=num_groups, how="cache")
    for number in range(6):
        drive.scheduler.add(new_sequence(number, 4, 4))
    drive.scheduler.admit()
    sizes = [len(drive.scheduler.schedule()) for _ in range(num_groups)]
    assert sizes == [6 // num_groups] * num_groups
    assert drive.scheduler.schedule() == []


def test_a_prompt_that_was_begun_is_read_before_others():
    """Else the one cut off by each micro-batch's budget would wait for all that came later."""
    scheduler = Scheduler(SlotAllocator(1000), max_num_seqs=8, max_batch_tokens=10)
    for number in range(8):
        scheduler.add(new_sequence(number, prompt=15, new=20))
    scheduler.admit()
    read: list[int] = []
    while len(read) < 8:
        work = scheduler.schedule()
        for sequence, count in work:
            scheduler.computed(sequence, count)
            if sequence.num_pending == 0:
                if sequence.num_generated == 0:
                    read.append(sequence.number)
                sequence.append(0)
    assert read == list(range(8))
