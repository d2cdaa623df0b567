"""Which layers run where. Pure Python: no torch, no model; costs in, bounds out.

* uniform: as many layers in each stage
* custom: cut at the given bounds
* memory: the cut that leaves the fullest device least full
* compute: the cut whose slowest stage is fastest
* mixed: as compute, among the cuts that fit
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from typing import Literal

from engine.config import PartitionStrategy
from engine.plan import PartitionPlan, StageSpec
from queue_api.wire.errors import PartitionError

__all__ = ["DeviceCosts", "plan_partition", "uniform_bounds"]


@dataclass(frozen=True)
class DeviceCosts:
    """What the model's parts take on one device."""

    layer_s: Sequence[float]
    """Seconds of each layer in a step."""
    layer_bytes: Sequence[int]
    """Weights and cache of each layer."""
    first_s: float = 0.0
    """What the first stage does besides: the embedding."""
    last_s: float = 0.0
    """What the last stage does besides: the final norm and the head."""
    first_bytes: int = 0
    last_bytes: int = 0
    shared_bytes: int = 0
    """Counted in both of the above, but held once by a stage that is both: tied embeddings."""
    stage_bytes: int = 0
    """Working memory of any stage."""
    free_bytes: int = 0
    """For all stages on the device together."""

    def stage_cost(self, stage: StageSpec) -> tuple[float, int]:
        """Seconds and bytes of a stage on this device."""
        layers = slice(stage.first_layer, stage.end_layer)
        seconds, size = self.ends_cost(is_first=stage.is_first, is_last=stage.is_last)
        return sum(self.layer_s[layers]) + seconds, sum(self.layer_bytes[layers]) + size

    def ends_cost(self, *, is_first: bool, is_last: bool) -> tuple[float, int]:
        """Seconds and bytes of a stage beside its layers'."""
        seconds = is_first * self.first_s + is_last * self.last_s
        size = is_first * self.first_bytes + is_last * self.last_bytes + self.stage_bytes
        return seconds, size - (is_first and is_last) * self.shared_bytes


def plan_partition(
    num_layers: int,
    devices: Sequence[str],
    strategy: PartitionStrategy = "uniform",
    layer_bounds: Sequence[int] | None = None,
    costs: Mapping[str, DeviceCosts] | None = None,
) -> PartitionPlan:
    """Cut `num_layers` layers into one contiguous stage per device.

    :param costs: by device; needed by `memory`, `compute` and `mixed`
    :raises PartitionError: more stages than layers, bounds that don't cut the layers, or no cut
        that fits the devices' memory
    """
    if len(devices) > num_layers:
        raise PartitionError(
            f"{len(devices)} stages for a model of {num_layers} layers: every stage needs one; "
            f"name at most {num_layers} devices"
        )
    if strategy == "custom":
        bounds = _checked_bounds(num_layers, len(devices), layer_bounds or ())
    elif strategy == "uniform":
        bounds = uniform_bounds(num_layers, len(devices))
    else:
        assert costs is not None, f"{strategy} cuts by costs"
        bounds = _cheapest_bounds(num_layers, devices, strategy, costs)
    return _plan(num_layers, devices, bounds)


def _plan(num_layers: int, devices: Sequence[str], bounds: Sequence[int]) -> PartitionPlan:
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


# ------------------------------------------------------------------------------- cut by costs

_Objective = Literal["time", "fill", "excess"]


@dataclass(frozen=True, slots=True)
class _Cut:
    """The first stages of a plan."""

    worst: float
    """What is to be small: of the slowest stage, or the fullest device."""
    squares: float
    """Among equals: the sum of the stages' squares, least when they are even."""
    used_bytes: tuple[int, ...]
    """By device; 0 for one that no later stage uses or whose memory isn't looked at."""
    bounds: tuple[int, ...]
    """Where each of them ends."""

    def is_as_good_as(self, other: _Cut) -> bool:
        return (self.worst, self.squares) <= (other.worst, other.squares) and all(
            mine <= theirs for mine, theirs in zip(self.used_bytes, other.used_bytes, strict=True)
        )


def _cheapest_bounds(
    num_layers: int,
    devices: Sequence[str],
    strategy: PartitionStrategy,
    costs: Mapping[str, DeviceCosts],
) -> list[int]:
    objective: _Objective = "fill" if strategy == "memory" else "time"
    best = _best_cut(num_layers, devices, costs, objective, must_fit=strategy != "compute")
    if best is not None:
        return list(best.bounds[:-1])
    nearest = _best_cut(num_layers, devices, costs, "excess", must_fit=False)
    assert nearest is not None
    used = dict.fromkeys(devices, 0)
    for stage in _plan(num_layers, devices, nearest.bounds[:-1]).stages:
        used[stage.device] += costs[stage.device].stage_cost(stage)[1]
    lacking, missing = max(
        ((name, size - costs[name].free_bytes) for name, size in used.items()), key=lambda e: e[1]
    )
    raise PartitionError(
        f"no cut of {num_layers} layers fits {', '.join(devices)}: at best {lacking} needs "
        f"{used[lacking]} bytes, {missing} bytes more than it has free; add a device, or lower "
        f"kv_cache_tokens, max_num_seqs or max_model_len"
    )


def _best_cut(
    num_layers: int,
    devices: Sequence[str],
    costs: Mapping[str, DeviceCosts],
    objective: _Objective,
    *,
    must_fit: bool,
) -> _Cut | None:
    """Dynamic programming over (stages so far, layers so far).

    Memory is a device's, and a device may have several stages: so of the cuts that reach the
    same point, all are kept that another doesn't beat in what is used as well. Mostly it's one.
    """
    names = list(dict.fromkeys(devices))
    limit = _even_price(num_layers, devices, costs, objective, must_fit=must_fit)
    reached = {0: [_Cut(-math.inf, 0.0, (0,) * len(names), ())]}
    for i, name in enumerate(devices):
        is_last = i == len(devices) - 1
        prices = _prices(costs[name], is_first=i == 0, is_last=is_last)
        rank, free_bytes = names.index(name), costs[name].free_bytes
        tracked = [n in devices[i + 1 :] and (must_fit or objective != "time") for n in names]
        following: dict[int, list[_Cut]] = {}
        for first, cuts in reached.items():
            # Each later stage needs a layer.
            ends = [num_layers] if is_last else range(first + 1, num_layers - len(devices) + i + 2)
            for end, cut in product(ends, cuts):
                seconds, size = prices(first, end)
                used = cut.used_bytes[rank] + size
                price = _price(objective, seconds, used, free_bytes)
                if price > limit or (must_fit and used > free_bytes):
                    continue
                own = seconds if objective == "time" else float(size)
                totals = [*cut.used_bytes[:rank], used, *cut.used_bytes[rank + 1 :]]
                longer = _Cut(
                    max(cut.worst, price),
                    cut.squares + own * own,
                    tuple(t if keep else 0 for t, keep in zip(totals, tracked, strict=True)),
                    (*cut.bounds, end),
                )
                _keep(following.setdefault(end, []), longer)
        reached = following
    return min(reached.get(num_layers, ()), key=lambda c: (c.worst, c.squares), default=None)


def _even_price(
    num_layers: int,
    devices: Sequence[str],
    costs: Mapping[str, DeviceCosts],
    objective: _Objective,
    *,
    must_fit: bool,
) -> float:
    """What the best cut costs at most: the price of the even one, if that is allowed."""
    used = dict.fromkeys(devices, 0)
    worst = -math.inf
    for stage in _plan(num_layers, devices, uniform_bounds(num_layers, len(devices))).stages:
        seconds, size = costs[stage.device].stage_cost(stage)
        used[stage.device] += size
        free_bytes = costs[stage.device].free_bytes
        if must_fit and used[stage.device] > free_bytes:
            return math.inf
        worst = max(worst, _price(objective, seconds, used[stage.device], free_bytes))
    return worst + abs(worst) * 1e-9  # sums in another order


def _prices(
    costs: DeviceCosts, *, is_first: bool, is_last: bool
) -> Callable[[int, int], tuple[float, int]]:
    """Seconds and bytes of a stage from its first layer and its end, by prefix sums."""
    seconds = [0.0, *accumulate(costs.layer_s)]
    sizes = [0, *accumulate(costs.layer_bytes)]
    more_s, more_bytes = costs.ends_cost(is_first=is_first, is_last=is_last)

    def prices(first: int, end: int) -> tuple[float, int]:
        return seconds[end] - seconds[first] + more_s, sizes[end] - sizes[first] + more_bytes

    return prices


def _price(objective: _Objective, seconds: float, used_bytes: int, free_bytes: int) -> float:
    if objective == "time":
        return seconds
    if objective == "excess":
        return used_bytes - free_bytes
    return used_bytes / free_bytes if free_bytes else 0.0  # it fits, so it is nothing, too


def _keep(cuts: list[_Cut], new: _Cut) -> None:
    """Add `new` unless a cut there is as good; drop those that it beats."""
    if any(cut.is_as_good_as(new) for cut in cuts):
        return
    cuts[:] = [cut for cut in cuts if not new.is_as_good_as(cut)]
    cuts.append(new)
