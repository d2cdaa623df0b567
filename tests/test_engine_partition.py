"""Layers are cut so that each belongs to exactly one stage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.planning.partition import plan_partition
from queue_api.wire.errors import PartitionError


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, list[int]]:
    num_layers = draw(st.integers(1, 60))
    inner = st.integers(1, max(1, num_layers - 1))
    bounds = draw(st.sets(inner, max_size=num_layers - 1)) if num_layers > 1 else set()
    return num_layers, sorted(bounds)


def assert_covers(plan, num_layers: int) -> None:
    layers = [i for stage in plan.stages for i in range(stage.first_layer, stage.end_layer)]
    assert layers == list(range(num_layers))
    assert [stage.index for stage in plan.stages] == list(range(len(plan.stages)))
    assert [stage.is_first for stage in plan.stages].count(True) == 1
    assert plan.stages[0].is_first
    assert plan.stages[-1].is_last
    assert [stage.is_last for stage in plan.stages].count(True) == 1


@given(cuts())
def test_custom_bounds_give_each_layer_to_one_stage(cut: tuple[int, list[int]]) -> None:
    num_layers, bounds = cut
    plan = plan_partition(num_layers, ["cpu"] * (len(bounds) + 1), "custom", bounds)
    assert_covers(plan, num_layers)
    assert [stage.first_layer for stage in plan.stages[1:]] == bounds


@given(st.integers(1, 60), st.data())
def test_uniform_sizes_differ_by_one_at_most_and_never_rise(num_layers: int, data) -> None:
    num_stages = data.draw(st.integers(1, num_layers))
    plan = plan_partition(num_layers, ["cpu"] * num_stages)
    assert_covers(plan, num_layers)
    sizes = [stage.num_layers for stage in plan.stages]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_devices_stay_with_their_stages() -> None:
    plan = plan_partition(8, ["cuda:0", "cpu", "cuda:0"], "custom", [3, 6])
    assert str(plan) == "0-2 on cuda:0, 3-5 on cpu, 6-7 on cuda:0"


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(PartitionError, match="5 stages for a model of 4 layers"):
        plan_partition(4, ["cpu"] * 5)


@pytest.mark.parametrize(
    "bounds", [[2], [2, 4, 5], [0, 4], [4, 4], [4, 2], [3, 8], [-1, 3]], ids=str
)
def test_bounds_that_do_not_cut_are_refused(bounds: list[int]) -> None:
    with pytest.raises(PartitionError, match="layer bounds"):
        plan_partition(8, ["cpu"] * 3, "custom", bounds)
