"""Which layers run where. Pure Python: no torch, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from engine.config import PartitionStrategy
from queue_api.errors import PartitionError

__all__ = ["PartitionPlan", "StageSpec", "plan_partition", "uniform_bounds"]


@dataclass(frozen=True)
class StageSpec:
    """One stage: a device and the layers `first_layer` up to, not including, `end_layer`."""

    index: int
    device: str
    first_layer: int
    end_layer: int
    is_first: bool
    """Owns the embedding."""
    is_last: bool
    """Owns the final norm and the head."""

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.first_layer


@dataclass(frozen=True)
class PartitionPlan:
    """All stages in order; together they hold every layer exactly once."""

    stages: tuple[StageSpec, ...]

    @property
    def num_layers(self) -> int:
        return self.stages[-1].end_layer

    def __str__(self) -> str:
        return ", ".join(f"{s.first_layer}-{s.end_layer - 1} on {s.device}" for s in self.stages)


def plan_partition(
    num_layers: int,
    devices: Sequence[str],
    strategy: PartitionStrategy = "uniform",
    layer_bounds: Sequence[int] | None = None,
) -> PartitionPlan:
    """Cut `num_layers` layers into one contiguous stage per device.

    :raises PartitionError: more stages than layers, or bounds that don't cut the layers
    """
    if len(devices) > num_layers:
        raise PartitionError(
            f"{len(devices)} stages for a model of {num_layers} layers: every stage needs one; "
            f"name at most {num_layers} devices"
        )
    if strategy == "custom":
        bounds = _checked_bounds(num_layers, len(devices), layer_bounds or ())
    else:
        bounds = uniform_bounds(num_layers, len(devices))
    edges = [0, *bounds, num_layers]
    stages = tuple(
        StageSpec(i, device, first, end, is_first=i == 0, is_last=i == len(devices) - 1)
        for i, (device, (first, end)) in enumerate(zip(devices, pairwise(edges), strict=True))
    )
    return PartitionPlan(stages)


def uniform_bounds(num_layers: int, num_stages: int) -> list[int]:
    """First layers of stages 1, 2, …; sizes differ by at most one, the larger ones in front.

    In front, because the last stage has the head to compute besides.
    """
    size, extra = divmod(num_layers, num_stages)
    return [i * size + min(i, extra) for i in range(1, num_stages)]


def _checked_bounds(num_layers: int, num_stages: int, bounds: Sequence[int]) -> list[int]:
    if len(bounds) != num_stages - 1:
        raise PartitionError(
            f"{len(bounds)} layer bounds for {num_stages} stages; give {num_stages - 1}"
        )
    edges = [0, *bounds, num_layers]
    if any(first >= end for first, end in pairwise(edges)):
        raise PartitionError(
            f"layer bounds {tuple(bounds)} don't cut {num_layers} layers: they must rise "
            f"strictly and lie between 1 and {num_layers - 1}"
        )
    return list(bounds)
