"""`batchmill plan`: which layers run where, what that takes, and what it really takes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from engine.config import EngineConfig
from engine.control_group import default_threads
from engine.loading import check_devices, length_limit
from engine.models.checkpoint import Checkpoint
from engine.models.slicing import load_config, resolve_dtype
from engine.plan import PartitionPlan, StageSpec
from engine.planning.costs import DECODE, PREFILL, CostModel, kind_of, plan_model
from engine.planning.measure import device_speed, measure_stages, speed_of_layers
from engine.planning.memory import CACHE_SHARE, available_bytes
from engine.planning.sizes import ModelSizes
from engine.stages.loading import load_stage
from engine.stages.stage import Stage
from engine.weights.format import weight_format

__all__ = ["PlanReport", "make_plan", "plan_table"]

STEPS = (DECODE, PREFILL)


@dataclass(frozen=True)
class StageTimes:
    """Predicted, or measured one stage after the other."""

    decode_s: float
    prefill_s: float
    peak_bytes: int | None
    """Weights as they are loaded, and both steps with the cache that they need."""
    bubble_share: float
    """Of its device's time, in a decode step with a micro-batch in each stage: what it waits."""


@dataclass(frozen=True)
class StageReport:
    index: int
    device: str
    first_layer: int
    end_layer: int
    num_params: int
    weight_bytes: int
    cache_bytes_per_token: int
    cache_budget_bytes: int
    predicted: StageTimes
    measured: StageTimes | None


@dataclass(frozen=True)
class PlanReport:
    """A plan, as `--json` prints it."""

    model: str
    revision: str | None
    strategy: str
    layer_bounds: list[int]
    """Give these to `--partition custom` to have this very plan."""
    dtype: str
    quantization: str
    pipeline: str
    num_threads: int
    """CPU threads of each stage."""
    cache_slots: int
    speeds: str
    """Where the predicted times come from: `nominal`, or `measured` on this machine."""
    steps: dict[str, dict[str, Any]]
    """What the times are for."""
    stages: list[StageReport]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def make_plan(config: EngineConfig, *, measure: bool = False) -> PlanReport:
    """Cut a model as a worker with this config does.

    :param measure: time the devices before the cut, then load the stages and run them
    :raises ConfigurationError: a model or a device that isn't there, or no cut that fits
    """
    trust = config.trust_remote_code
    checkpoint = Checkpoint.find(config.model, config.revision, trust_remote_code=trust)
    model_config = load_config(checkpoint, trust_remote_code=trust)
    check_devices(config.devices)
    dtype = resolve_dtype(config.dtype, model_config, config.devices)
    limit = length_limit(config, model_config.get_text_config())
    sizes = ModelSizes.read(checkpoint, model_config)
    is_inline, num_threads = _threads(config)
    weights = weight_format(config.quantization)
    small = weights.small_params(model_config, trust_remote_code=trust)
    costs = CostModel.nominal(sizes, dtype.itemsize, config.devices, small)

    def load(spec: StageSpec) -> Stage:
        return load_stage(
            checkpoint,
            model_config,
            spec,
            dtype,
            longest=limit,
            weights=weights,
            trust_remote_code=trust,
        )

    if measure:
        torch.set_num_threads(num_threads)
        speeds = {
            name: device_speed(name, dtype, sizes, weights=weights) for name in set(config.devices)
        }
        costs = dataclasses.replace(costs, speeds=speeds)
        speeds = {name: speed_of_layers(load, model_config, costs, name, dtype) for name in speeds}
        costs = dataclasses.replace(costs, speeds=speeds)
    plan = plan_model(config, costs, limit)
    slots = _cache_slots(config, plan, costs, limit)
    times = _predicted(plan, costs)
    measured: Sequence[StageTimes | None] = [None] * len(plan.stages)
    if measure:
        found = measure_stages(load, model_config, plan, trust_remote_code=trust)
        bubbles = _bubbles(plan, [stage.decode_s for stage in found])
        measured = [
            StageTimes(stage.decode_s, stage.prefill_s, stage.peak_bytes, bubble)
            for stage, bubble in zip(found, bubbles, strict=True)
        ]
    return PlanReport(
        model=checkpoint.name,
        revision=checkpoint.revision,
        strategy=config.partition,
        layer_bounds=[stage.first_layer for stage in plan.stages[1:]],
        dtype=str(dtype).removeprefix("torch."),
        quantization=config.quantization,
        pipeline="inline" if is_inline else "threads",
        num_threads=num_threads,
        cache_slots=slots,
        speeds="measured" if measure else "nominal",
        steps={step.name: dataclasses.asdict(step) for step in STEPS},
        stages=[
            _stage_report(costs, slots, *row)
            for row in zip(plan.stages, times, measured, strict=True)
        ],
    )


def _threads(config: EngineConfig) -> tuple[bool, int]:
    """Whether the stages run inline, and the CPU threads that each has, as in the engine."""
    is_inline = len(set(config.devices)) == 1
    if config.pipeline != "auto":
        is_inline = config.pipeline == "inline"
    total = config.num_threads or default_threads()
    return is_inline, total if is_inline else max(1, total // len(config.devices))


def _cache_slots(config: EngineConfig, plan: PartitionPlan, costs: CostModel, limit: int) -> int:
    """Slots that the engine will make, by its own rule."""
    if config.kv_cache_tokens is not None:
        return config.kv_cache_tokens
    weights: dict[str, int] = defaultdict(int)
    slot_bytes: dict[str, int] = defaultdict(int)
    for stage in plan.stages:
        weights[stage.device] += costs.weight_bytes(stage)
        slot_bytes[stage.device] += stage.num_layers * costs.slot_bytes
    room = [
        (available_bytes(torch.device(name)) - weights[name])
        * CACHE_SHARE[kind_of(name)]
        // slot_bytes[name]
        for name in weights
        if slot_bytes[name]
    ]
    return max(0, int(min([config.max_num_seqs * limit, *room])))


def _predicted(plan: PartitionPlan, costs: CostModel) -> list[StageTimes]:
    decode_s = [costs.stage_s(stage, DECODE) for stage in plan.stages]
    return [
        StageTimes(seconds, costs.stage_s(stage, PREFILL), costs.peak_bytes(stage, STEPS), bubble)
        for stage, seconds, bubble in zip(
            plan.stages, decode_s, _bubbles(plan, decode_s), strict=True
        )
    ]


def _bubbles(plan: PartitionPlan, seconds: Sequence[float]) -> list[float]:
    """The share of time that each stage's device waits for the slowest device.

    Stages on one device take turns, so their times add up.
    """
    busy: dict[str, float] = defaultdict(float)
    for stage, stage_s in zip(plan.stages, seconds, strict=True):
        busy[stage.device] += stage_s
    return [1 - busy[stage.device] / max(busy.values()) for stage in plan.stages]


def _stage_report(
    costs: CostModel,
    slots: int,
    stage: StageSpec,
    predicted: StageTimes,
    measured: StageTimes | None,
) -> StageReport:
    token_bytes = stage.num_layers * costs.slot_bytes
    return StageReport(
        index=stage.index,
        device=stage.device,
        first_layer=stage.first_layer,
        end_layer=stage.end_layer,
        num_params=costs.sizes.stage_params(stage),
        weight_bytes=costs.weight_bytes(stage),
        cache_bytes_per_token=token_bytes,
        cache_budget_bytes=slots * token_bytes,
        predicted=predicted,
        measured=measured,
    )


# ---------------------------------------------------------------------------------- the table


def plan_table(report: PlanReport) -> Table:
    """A row per stage; where there is a measurement, as predicted / as measured."""
    table = Table(title=_title(report), caption=_caption(report), caption_justify="left")
    table.add_column("stage")
    for heading in ("layers", "params", "weights", "cache/token", "cache", "decode ms"):
        table.add_column(heading, justify="right")
    for heading in ("prefill ms", "peak", "bubble"):
        table.add_column(heading, justify="right")
    for stage in report.stages:
        both = [stage.predicted, *([stage.measured] if stage.measured else [])]
        table.add_row(
            f"{stage.index} {stage.device}",
            f"{stage.first_layer}-{stage.end_layer - 1}",
            f"{stage.num_params:,}",
            _size(stage.weight_bytes),
            _size(stage.cache_bytes_per_token),
            _size(stage.cache_budget_bytes),
            " / ".join(f"{times.decode_s * 1e3:.2f}" for times in both),
            " / ".join(f"{times.prefill_s * 1e3:.2f}" for times in both),
            " / ".join(_size(times.peak_bytes) for times in both),
            " / ".join(f"{times.bubble_share:.0%}" for times in both),
        )
    return table


def _title(report: PlanReport) -> str:
    threads = f"{report.num_threads} thread{'s' * (report.num_threads > 1)}"
    numbers = report.dtype
    if report.quantization != "none":
        numbers += f" with {report.quantization} weights"
    return f"{report.model}, {report.strategy}, {numbers}, {report.pipeline}, {threads}"


def _caption(report: PlanReport) -> str:
    source = "as predicted / as measured" if report.speeds == "measured" else "by rule of thumb"
    bounds = ",".join(map(str, report.layer_bounds))
    again = f"\nto have this cut: --partition custom --layer-bounds {bounds}" if bounds else ""
    return (
        f"{source}; decode: {DECODE.num_seqs} sequences at {DECODE.past} tokens; "
        f"prefill: {PREFILL.num_tokens} tokens of one; peak: loading and both steps; "
        f"cache: {report.cache_slots:,} slots{again}"
    )


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "-"
    size = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"
