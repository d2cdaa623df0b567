"""Slots are never lost and never given out twice; caches hold a stage's own layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from kits.engine_models import LAYERS, tiny_model

from engine.attention.kv_pool import KVPool, KVShape
from engine.batch import CacheCopy
from engine.scheduling.slots import SlotAllocator

NUM_SLOTS = 40


class AllocatorMachine(RuleBasedStateMachine):
    """Random allocations and frees, against a plain set of the slots in use."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = SlotAllocator(NUM_SLOTS)
        self.ranges: dict[int, int] = {}

    def used(self) -> set[int]:
        return {slot for first, n in self.ranges.items() for slot in range(first, first + n)}

    def longest_gap(self) -> int:
        used, longest, current = self.used(), 0, 0
        for slot in range(NUM_SLOTS):
            current = 0 if slot in used else current + 1
            longest = max(longest, current)
        return longest

    @rule(length=st.integers(1, NUM_SLOTS + 1))
    def allocate(self, length: int) -> None:
        gap = self.longest_gap()
        first = self.allocator.allocate(length)
        assert (first is not None) == (length <= gap)
        if first is not None:
            taken = set(range(first, first + length))
            assert taken <= set(range(NUM_SLOTS))
            assert not taken & self.used()
            self.ranges[first] = length

    @rule(data=st.data())
    def free(self, data) -> None:
        if self.ranges:
            first = data.draw(st.sampled_from(sorted(self.ranges)))
            self.allocator.free(first)
            del self.ranges[first]

    @rule(data=st.data())
    def shrink(self, data) -> None:
        if self.ranges:
            first = data.draw(st.sampled_from(sorted(self.ranges)))
            self.ranges[first] = data.draw(st.integers(1, self.ranges[first]))
            self.allocator.shrink(first, self.ranges[first])

    @invariant()
    def counts_agree(self) -> None:
        assert self.allocator.num_free == NUM_SLOTS - len(self.used())


TestAllocator = AllocatorMachine.TestCase


@given(st.permutations(range(8)))
def test_all_slots_are_one_range_again_when_all_are_free(order: list[int]) -> None:
    allocator = SlotAllocator(NUM_SLOTS)
    firsts = [allocator.allocate(5) for _ in range(8)]
    for i in order:
        allocator.free(firsts[i])
    assert allocator.allocate(NUM_SLOTS) == 0


def test_freeing_what_is_not_in_use_is_an_error() -> None:
    allocator = SlotAllocator(NUM_SLOTS)
    first = allocator.allocate(3)
    allocator.free(first)
    with pytest.raises(KeyError):
        allocator.free(first)


def test_write_changes_only_its_layer_and_slots() -> None:
    shapes = [KVShape(2, 4, 6)] * 3
    pool = KVPool(shapes, 10, device=torch.device("cpu"), dtype=torch.float32)
    for tensor in (*pool.keys, *pool.values):
        tensor.zero_()
    key, value = torch.ones(2, 3, 4), torch.ones(2, 3, 6)
    pool.write(1, torch.tensor([7, 2, 4]), key, value)
    for tensors in (pool.keys, pool.values):
        assert tensors[0].eq(0).all()
        assert tensors[2].eq(0).all()
        assert tensors[1].sum(dim=(0, 2)).nonzero()[:, 0].tolist() == [2, 4, 7]


def test_a_copy_is_made_in_every_layer() -> None:
    pool = KVPool([KVShape(2, 4, 6)] * 3, 10, device=torch.device("cpu"), dtype=torch.float32)
    for tensor in (*pool.keys, *pool.values):
        tensor.copy_(torch.arange(10.0)[None, :, None].expand_as(tensor))
    pool.copy([CacheCopy(6, 1, 3), CacheCopy(0, 9, 1)])
    for tensor in (*pool.keys, *pool.values):
        expected = torch.tensor([0.0, 6, 7, 8, 4, 5, 6, 7, 8, 0])
        assert tensor.eq(expected[None, :, None]).all()


@pytest.mark.parametrize("bounds", [(), (3,), (1, 5)])
def test_each_stage_caches_its_own_layers_on_its_device(bounds: tuple[int, ...]) -> None:
    engine = tiny_model("llama").engine(
        devices=("cpu",) * (len(bounds) + 1),
        partition="custom" if bounds else "uniform",
        layer_bounds=bounds or None,
        kv_cache_tokens=70,
    )
    num_cached = 0
    for stage in engine.stages:
        tensors = [*stage.pool.keys, *stage.pool.values]
        assert len(tensors) == 2 * stage.spec.num_layers
        assert {tensor.device for tensor in tensors} == {torch.device(stage.spec.device)}
        assert {tuple(tensor.shape) for tensor in tensors} == {(2, 70, 8)}  # [Hkv, S, D]
        num_cached += stage.spec.num_layers
    assert num_cached == LAYERS
