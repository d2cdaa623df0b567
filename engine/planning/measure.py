"""How fast this machine is at a model's steps, and what a plan's stages really take.

The quickest of several runs counts: what other programs take of the machine isn't the model's.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from engine.attention.choice import backends_for
from engine.attention.hook import AttentionCall, attend_packed, attending
from engine.attention.kv_pool import KVPool, KVShape
from engine.attention.masks import MaskRule
from engine.batch import ForwardBatch, Segment
from engine.kernels.malloc import give_back_freed_memory
from engine.models.slicing import model_without_weights
from engine.plan import PartitionPlan, StageSpec
from engine.planning.costs import DECODE, PREFILL, CostModel, DeviceSpeed, Step, StepSpeed
from engine.planning.memory import anonymous_bytes
from engine.planning.partition import plan_partition
from engine.planning.sizes import ModelSizes
from engine.stages.stage import Stage
from engine.weights.format import AS_PUBLISHED, WeightFormat
from engine.weights.layout import can_lay_out, lay_out_linears
from queue_api.wire.errors import UnsupportedModelError

__all__ = ["MeasuredStage", "device_speed", "measure_stages", "speed_of_layers"]

_RUN_S = 1.0
_LEAST_RUNS = 3
_BEYOND_CACHES_BYTES = 64 << 20
"""So many bytes of matrices in turn, as a model's are: one alone would stay in the CPU's caches."""
_SAMPLE_S = 0.001


@dataclass(frozen=True)
class MeasuredStage:
    """One stage of a plan, alone on its device."""

    decode_s: float
    prefill_s: float
    peak_bytes: int | None
    """While it was loaded and ran both steps; None where it can't be told."""


# ------------------------------------------------------------------------------ the machine


@torch.inference_mode()
def device_speed(
    device_name: str,
    dtype: torch.dtype,
    sizes: ModelSizes,
    *,
    weights: WeightFormat = AS_PUBLISHED,
) -> DeviceSpeed:
    """Time a device at products, elementwise operations and attention of the model's shapes."""
    device = torch.device(device_name)
    matrices = _matrices(device, dtype, sizes, weights)

    def products_s(num_rows: int) -> float:
        rows = torch.randn(num_rows, sizes.hidden_size, device=device, dtype=dtype)
        return _quickest(device, lambda: [matrix(rows) for matrix in matrices])

    def at(step: Step) -> StepSpeed:
        flops = 2 * step.num_tokens * len(matrices) * sizes.hidden_size * sizes.intermediate_size
        x = torch.randn(1, step.num_tokens, sizes.hidden_size, device=device, dtype=dtype)
        return StepSpeed(
            flops / products_s(step.num_tokens),
            _quickest(device, lambda: [x * x for _ in range(20)]) / 20,
            _attention_s(device, dtype, sizes, step),
        )

    read = len(matrices) * sizes.hidden_size * sizes.intermediate_size
    read *= weights.weight_bytes(dtype)
    return DeviceSpeed(read / products_s(1), at(DECODE), at(PREFILL))


def _matrices(
    device: torch.device, dtype: torch.dtype, sizes: ModelSizes, weights: WeightFormat
) -> Sequence[nn.Module]:
    """Linear layers of the model's width, as a stage has them."""
    shape = sizes.hidden_size, sizes.intermediate_size
    one = shape[0] * shape[1] * weights.weight_bytes(dtype)
    count = min(len(sizes.layers) * 4, max(2, _BEYOND_CACHES_BYTES // one))
    kwargs: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
    matrices = nn.Sequential(*(nn.Linear(*shape, **kwargs) for _ in range(count)))
    lays_out = can_lay_out(device, dtype)
    weights.convert(matrices, lays_out=lays_out, where=f"measuring {device}", model="its layers")
    if lays_out:
        lay_out_linears(matrices)
    return list(matrices)


def _attention_s(device: torch.device, dtype: torch.dtype, sizes: ModelSizes, step: Step) -> float:
    if not sizes.num_heads:
        return 0.0
    batch = _batch(step, sizes.vocab_size)
    shape = KVShape(sizes.num_kv_heads, sizes.key_size, sizes.value_size)
    layer_bytes = step.num_slots * shape.slot_bytes(dtype)
    count = min(len(sizes.layers), 1 + math.ceil(_BEYOND_CACHES_BYTES / layer_bytes))
    backend = backends_for(device, dtype)[0]
    pool = KVPool(
        [shape] * count,
        step.num_slots,
        device=device,
        dtype=dtype,
        token_major=backend.token_major,
    )
    _fill(pool)

    def some(num_heads: int, size: int) -> torch.Tensor:  # [1, H, T, D]
        return torch.randn(1, num_heads, step.num_tokens, size, device=device, dtype=dtype)

    query = some(sizes.num_heads, sizes.key_size)
    key = some(sizes.num_kv_heads, sizes.key_size)
    value = some(sizes.num_kv_heads, sizes.value_size)
    modules = [cast(nn.Module, SimpleNamespace(layer_idx=i)) for i in range(count)]

    def attend() -> None:
        with attending(AttentionCall(batch, pool, 0, backend)):
            for module in modules:
                attend_packed(module, query, key, value, MaskRule())

    return _quickest(device, attend) / count


@torch.inference_mode()
def speed_of_layers(
    load: Callable[[StageSpec], Stage],
    model_config: Any,
    costs: CostModel,
    device: str,
    dtype: torch.dtype,
) -> DeviceSpeed:
    """A device's speed, with what some of the model's layers take beside products and attention.

    The layers run as a stage does, and what the counted products and attention don't explain is
    given to the elementwise operations: norms, rotation, copies, and the Python between them.
    The speed stays as it was for a model whose layers can't be cut out.
    """
    spec = _sample_layers(costs, device)
    vocab_size = costs.sizes.vocab_size
    try:
        stage = load(spec)
    except UnsupportedModelError:  # it may run uncut all the same
        return costs.speeds[device]
    steps = (DECODE, PREFILL)
    batches = [_batch(step, vocab_size) for step in steps]
    passed = [batch.token_ids[None] for batch in batches]
    if not spec.is_first:
        size = model_config.get_text_config().hidden_size
        passed = [torch.randn(1, step.num_tokens, size).to(device, dtype) for step in steps]
    seconds, _ = _run(stage, spec, batches, passed, vocab_size)
    found = costs.speeds[device]
    bare = DeviceSpeed(
        found.bytes_per_s,
        dataclasses.replace(found.decode, op_s=0.0),
        dataclasses.replace(found.prefill, op_s=0.0),
    )
    counted = dataclasses.replace(costs, speeds={device: bare})
    op_s = [
        max(0.0, total - counted.stage_s(spec, step)) / costs.num_ops(spec)
        for total, step in zip(seconds, steps, strict=True)
    ]
    return DeviceSpeed(
        found.bytes_per_s,
        dataclasses.replace(found.decode, op_s=op_s[0]),
        dataclasses.replace(found.prefill, op_s=op_s[1]),
    )


def _sample_layers(costs: CostModel, device: str) -> StageSpec:
    """Layers without embedding and head, as many as are beyond a CPU's caches; at least one."""
    layers = costs.sizes.layers
    if len(layers) < 3:
        return plan_partition(len(layers), [device]).stages[0]
    one = max(1, costs.layer_bytes(1))
    end = 1 + min(len(layers) - 2, max(1, _BEYOND_CACHES_BYTES // one))
    bounds = (1, end)
    return plan_partition(len(layers), [device] * 3, "custom", bounds).stages[1]


# --------------------------------------------------------------------------------- the stages


@torch.inference_mode()
def measure_stages(
    load: Callable[[StageSpec], Stage],
    model_config: Any,
    plan: PartitionPlan,
    *,
    trust_remote_code: bool = False,
) -> list[MeasuredStage]:
    """Load a plan's stages and run a decode step and a prefill step through each, one by one.

    :raises UnsupportedModelError: if the model can't run here
    """
    # What is imported with the model's class isn't a stage's memory.
    model_without_weights(model_config, trust_remote_code=trust_remote_code)
    vocab_size = model_config.get_text_config().vocab_size
    batches = [_batch(step, vocab_size) for step in (DECODE, PREFILL)]
    passed = [batch.token_ids[None] for batch in batches]
    stages, measured = [], []
    for spec in plan.stages:
        with _peak_memory(torch.device(spec.device)) as peak:
            stage = load(spec)
            seconds, passed = _run(stage, spec, batches, passed, vocab_size)
        measured.append(MeasuredStage(seconds[0], seconds[1], peak()))
        stages.append(stage)  # The other stages are to be where they will be, too.
    return measured


def _run(
    stage: Stage,
    spec: StageSpec,
    batches: Sequence[ForwardBatch],
    passed: Sequence[torch.Tensor],
    vocab_size: int,
) -> tuple[list[float], list[torch.Tensor]]:
    """Seconds of each batch in a stage, and what it hands on."""
    stage.allocate(DECODE.num_slots)
    if stage.pool is not None:
        _fill(stage.pool)
    else:
        _read_past(stage, spec, vocab_size)
    seconds, outputs = [], []
    for batch, inbound in zip(batches, passed, strict=True):

        def run(batch: ForwardBatch = batch, inbound: torch.Tensor = inbound) -> torch.Tensor:
            return stage.run(batch, inbound)

        outputs.append(run())
        seconds.append(_quickest(stage.device, run))
    stage.pool = None
    for number in range(DECODE.num_seqs):
        stage.release(number)
    return seconds, outputs


def _read_past(stage: Stage, spec: StageSpec, vocab_size: int) -> None:
    """Give a stage without a pool the sequences that the decode step goes on with."""
    batch = _batch(Step("past", DECODE.num_seqs, DECODE.past, 0), vocab_size)
    inbound = batch.token_ids[None]
    if not spec.is_first:
        size = stage.model.config.get_text_config().hidden_size
        inbound = torch.randn(1, batch.num_tokens, size, dtype=stage.dtype)
    stage.run(batch, inbound)


def _fill(pool: KVPool) -> None:
    """Random numbers, so that the pages are there and nothing is a NaN."""
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_()


def _batch(step: Step, vocab_size: int) -> ForwardBatch:
    """A micro-batch of random tokens, as the scheduler would pack it."""
    new, length = step.new_tokens, step.past + step.new_tokens
    numbers = torch.arange(step.num_seqs)
    positions = torch.arange(step.past, length).repeat(step.num_seqs)  # [T]
    generator = torch.Generator().manual_seed(0)
    return ForwardBatch(
        segments=[Segment(i * new, new, step.past, i * length, i) for i in range(step.num_seqs)],
        token_ids=torch.randint(vocab_size, (step.num_tokens,), generator=generator),
        positions=positions,
        slots=positions + numbers.repeat_interleave(new) * length,
        logit_rows=(numbers + 1) * new - 1,
    )


# ------------------------------------------------------------------------------ time, memory


def _quickest(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the quickest of some runs, after one that isn't counted."""
    _time(device, work)
    times = [_time(device, work) for _ in range(_LEAST_RUNS)]
    while sum(times) < _RUN_S:
        times.append(_time(device, work))
    return min(times)


def _time(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cpu":  # not the clock: other programs' turns on the core aren't the model's
        started = time.thread_time()
        work()
        return time.thread_time() - started
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Bytes by which memory in use grew at most, once the block has ended.

    On a CPU the process's anonymous memory, looked at every millisecond; mapped files aren't in it.
    """
    give_back_freed_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    seen = [start := anonymous_bytes()]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_S):
            seen[0] = max(seen[0], anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: seen[0] - start if start else None
    finally:
        ended.set()
        watcher.join()
