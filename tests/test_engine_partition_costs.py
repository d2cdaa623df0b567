"""Cuts by cost are the best there are, by trying all of them."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import PartitionPlan
from engine.planning.partition import DeviceCosts, plan_partition
from queue_api.wire.errors import PartitionError

NAMES = ["cuda:0", "cuda:1", "cpu"]
MIXES = st.lists(st.sampled_from(NAMES), min_size=1, max_size=5)
Costs = dict[str, DeviceCosts]


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, list[str], Costs]:
    """A model and devices; whole seconds, so that sums are exact. A device may come twice."""
    devices = draw(MIXES)
    num_layers = draw(st.integers(len(devices), 8))
    small = st.integers(0, 9)
    per_layer = st.lists(small, min_size=num_layers, max_size=num_layers)
    costs = {}
    for name in set(devices):
        first, last = draw(small), draw(small)
        costs[name] = DeviceCosts(
            layer_s=[float(s) for s in draw(per_layer)],
            layer_bytes=draw(per_layer),
            first_s=float(draw(small)),
            last_s=float(draw(small)),
            first_bytes=first,
            last_bytes=last,
            shared_bytes=draw(st.integers(0, min(first, last))),
            stage_bytes=draw(st.integers(0, 3)),
            free_bytes=draw(st.integers(0, 60)),
        )
    return num_layers, devices, costs


def all_plans(num_layers: int, num_stages: int, devices: list[str]) -> list[PartitionPlan]:
    return [
        plan_partition(num_layers, devices, "custom", bounds)
        for bounds in combinations(range(1, num_layers), num_stages - 1)
    ]


def slowest(plan: PartitionPlan, costs: Costs) -> float:
    return max(costs[stage.device].stage_cost(stage)[0] for stage in plan.stages)


def used(plan: PartitionPlan, costs: Costs) -> dict[str, int]:
    total = dict.fromkeys(costs, 0)
    for stage in plan.stages:
        total[stage.device] += costs[stage.device].stage_cost(stage)[1]
    return total


def excess(plan: PartitionPlan, costs: Costs) -> int:
    return max(size - costs[name].free_bytes for name, size in used(plan, costs).items())


def fullest(plan: PartitionPlan, costs: Costs) -> float:
    return max(
        size / costs[name].free_bytes if size else 0.0 for name, size in used(plan, costs).items()
    )


@given(cases(), st.sampled_from(["memory", "compute", "mixed"]))
@settings(max_examples=300, deadline=None)
def test_no_cut_beats_the_one_that_is_chosen(case: tuple[int, list[str], Costs], strategy) -> None:
    num_layers, devices, costs = case
    every = all_plans(num_layers, len(devices), devices)
    fitting = [plan for plan in every if excess(plan, costs) <= 0]
    if strategy != "compute" and not fitting:
        with pytest.raises(PartitionError) as raised:
            plan_partition(num_layers, devices, strategy, costs=costs)
        missing = min(excess(plan, costs) for plan in every)
        assert re.search(rf" {missing} bytes more than it has free", str(raised.value))
        return
    chosen = plan_partition(num_layers, devices, strategy, costs=costs)
    layers = [i for s in chosen.stages for i in range(s.first_layer, s.end_layer)]
    assert layers == list(range(num_layers))
    assert [stage.device for stage in chosen.stages] == devices
    if strategy == "compute":
        assert slowest(chosen, costs) == min(slowest(plan, costs) for plan in every)
        return
    assert excess(chosen, costs) <= 0
    measure = fullest if strategy == "memory" else slowest
    assert measure(chosen, costs) == min(measure(plan, costs) for plan in fitting)


def sizes(plan: PartitionPlan) -> list[int]:
    return [stage.num_layers for stage in plan.stages]


def test_a_heavy_embedding_and_head_get_fewer_layers() -> None:
    costs = {"cpu": DeviceCosts([1.0] * 16, [1] * 16, first_s=2.0, last_s=3.0)}
    assert sizes(plan_partition(16, ["cpu"] * 4, "compute", costs=costs)) == [3, 5, 5, 3]


def test_a_slower_device_gets_fewer_layers() -> None:
    costs = {
        "cuda:0": DeviceCosts([1.0] * 12, [1] * 12),
        "cpu": DeviceCosts([5.0] * 12, [1] * 12),
    }
    assert sizes(plan_partition(12, ["cuda:0", "cpu"], "compute", costs=costs)) == [10, 2]


def test_a_fast_device_without_memory_gets_what_fits() -> None:
    costs = {
        "cuda:0": DeviceCosts([1.0] * 12, [10] * 12, free_bytes=45),
        "cpu": DeviceCosts([5.0] * 12, [10] * 12, free_bytes=1000),
    }
    assert sizes(plan_partition(12, ["cuda:0", "cpu"], "mixed", costs=costs)) == [4, 8]


def test_two_stages_of_a_device_share_its_memory() -> None:
    costs = {
        "cuda:0": DeviceCosts([1.0] * 6, [10] * 6, free_bytes=30),
        "cpu": DeviceCosts([9.0] * 6, [10] * 6, free_bytes=30),
    }
    plan = plan_partition(6, ["cuda:0", "cpu", "cuda:0"], "mixed", costs=costs)
    assert used(plan, costs) == {"cuda:0": 30, "cpu": 30}


def test_even_stages_are_preferred_where_memory_leaves_a_choice() -> None:
    costs = {"cpu": DeviceCosts([1.0] * 8, [10] * 8, free_bytes=200)}
    assert sizes(plan_partition(8, ["cpu"] * 4, "memory", costs=costs)) == [2, 2, 2, 2]


def test_many_stages_of_many_layers_are_cut_soon() -> None:
    costs = {
        name: DeviceCosts([1.0] * 80, [10] * 80, first_s=1.0, last_s=2.0, free_bytes=500)
        for name in ("cuda:0", "cuda:1")
    }
    plan = plan_partition(80, ["cuda:0", "cuda:1"] * 4, "mixed", costs=costs)
    assert sum(sizes(plan)) == 80
    assert max(sizes(plan)) - min(sizes(plan)) <= 3
