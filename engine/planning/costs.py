"""What a model's parts take on a device, in bytes and in seconds, and the cut that follows.

Seconds come from counting: multiplications and bytes, over what the device does of them in a
second, by rule of thumb or as measured (measure.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.config import EngineConfig
from engine.plan import PartitionPlan, StageSpec
from engine.planning.memory import CACHE_SHARE, available_bytes
from engine.planning.partition import DeviceCosts, plan_partition
from engine.planning.sizes import ModelSizes, Part
from engine.weights.layout import can_lay_out
from queue_api.wire.errors import PartitionError

__all__ = [
    "DECODE",
    "NOMINAL_SPEEDS",
    "PREFILL",
    "CostModel",
    "DeviceSpeed",
    "Step",
    "StepSpeed",
    "kind_of",
    "plan_model",
]

LAYER_OPS = 30
"""Elementwise operations on [T, E] in a layer: two norms, rotation, residuals, copies."""
STAGE_OPS = 30
"""The same around the layers: the mask, the rotation's angles, the final norm."""
_WIDE_OPS = 2  # on [T, intermediate size]


@dataclass(frozen=True)
class Step:
    """What one forward has to do."""

    name: str
    num_seqs: int
    new_tokens: int
    """Of each sequence."""
    past: int
    """Tokens of each sequence that are in the cache."""

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * self.new_tokens

    @property
    def num_slots(self) -> int:
        """Of the cache, with the new tokens."""
        return self.num_seqs * (self.past + self.new_tokens)


DECODE = Step("decode", num_seqs=64, new_tokens=1, past=256)
PREFILL = Step("prefill", num_seqs=1, new_tokens=512, past=0)


@dataclass(frozen=True)
class StepSpeed:
    """How fast a device is at a step of a model."""

    flops_per_s: float
    """Of matrix products with as many rows as the step has tokens."""
    op_s: float
    """One elementwise operation on [T, E], and a layer's Python in as many parts."""
    attention_s: float
    """Attention of one layer, the cache included."""


@dataclass(frozen=True)
class DeviceSpeed:
    bytes_per_s: float
    """Weights read by a product of one row."""
    decode: StepSpeed
    prefill: StepSpeed

    def at(self, step: Step) -> StepSpeed:
        return self.decode if step.name == DECODE.name else self.prefill


@dataclass(frozen=True)
class _Nominal:
    """A device of its kind, by rule of thumb: enough to tell a heavy part from a light one."""

    flops_per_s: float
    bytes_per_s: float
    op_s: float
    call_s: float
    """Attention of one sequence in one layer, beside its bytes."""

    def speed(self, sizes: ModelSizes, itemsize: int) -> DeviceSpeed:
        def at(step: Step) -> StepSpeed:
            hidden_bytes = step.num_tokens * sizes.hidden_size * itemsize
            cache_bytes = step.num_slots * sizes.slot_elements * itemsize
            # Causal: a new token sees half of the new ones in the mean.
            seen = step.past + (step.new_tokens + 1) / 2
            flops = 2 * step.num_tokens * seen * sizes.num_heads
            flops *= sizes.key_size + sizes.value_size
            attention_s = max(cache_bytes / self.bytes_per_s, flops / self.flops_per_s)
            return StepSpeed(
                self.flops_per_s,
                self.op_s + 2 * hidden_bytes / self.bytes_per_s,
                step.num_seqs * self.call_s + attention_s,
            )

        return DeviceSpeed(self.bytes_per_s, at(DECODE), at(PREFILL))


NOMINAL_SPEEDS: Mapping[str, _Nominal] = {
    "cpu": _Nominal(flops_per_s=1e11, bytes_per_s=1.5e10, op_s=5e-6, call_s=2e-5),
    "cuda": _Nominal(flops_per_s=1e14, bytes_per_s=1e12, op_s=5e-6, call_s=2e-5),
}


@dataclass(frozen=True)
class CostModel:
    """Bytes and seconds of the parts of one model in one dtype."""

    sizes: ModelSizes
    itemsize: int
    """Bytes of an element of weights, activations and cache."""
    speeds: Mapping[str, DeviceSpeed]
    """By device."""
    quantized: tuple[int, ...] = ()
    """How many parameters of each layer take one byte; empty if none does."""

    @classmethod
    def nominal(
        cls,
        sizes: ModelSizes,
        itemsize: int,
        devices: Sequence[str],
        quantized: tuple[int, ...] = (),
    ) -> CostModel:
        """With each device's speed by rule of thumb."""
        speeds = {
            name: NOMINAL_SPEEDS[kind_of(name)].speed(sizes, itemsize) for name in set(devices)
        }
        return cls(sizes, itemsize, speeds, quantized)

    @property
    def slot_bytes(self) -> int:
        """Bytes that one token takes in one layer's cache."""
        return self.sizes.slot_elements * self.itemsize

    def weight_bytes(self, stage: StageSpec) -> int:
        """Weights that a stage holds."""
        copied = self._copied(stage.device) if stage.is_last else 0
        total = (self.sizes.stage_params(stage) + copied) * self.itemsize
        return total - self._saved_bytes(stage.first_layer, stage.end_layer)

    def layer_bytes(self, layer: int) -> int:
        """Weights of one layer."""
        total = self.sizes.layers[layer].num_params * self.itemsize
        return total - self._saved_bytes(layer, layer + 1)

    def _saved_bytes(self, first_layer: int, end_layer: int) -> int:
        """What quantization saves of the weights of some layers."""
        return (self.itemsize - 1) * sum(self.quantized[first_layer:end_layer])

    def _copied(self, device: str) -> int:
        """Parameters of a tied embedding that are laid out a second time to be the head."""
        return self.sizes.shared_params if self.lays_out(device) else 0

    def lays_out(self, device: str) -> bool:
        """True where weights are laid out anew when they are loaded."""
        dtype = torch.float32 if self.itemsize == 4 else torch.bfloat16
        return can_lay_out(torch.device(device), dtype)

    def working_bytes(self, num_tokens: int) -> int:
        """Activations of a step, its logits excepted."""
        wide = 3 * self.sizes.intermediate_size + 6 * self.sizes.hidden_size
        return num_tokens * wide * self.itemsize

    def peak_bytes(self, stage: StageSpec, steps: Sequence[Step]) -> int:
        """A stage's memory at its peak: while it is loaded, or in the largest of the steps."""
        weights = self.weight_bytes(stage)
        layers = self.sizes.layers[stage.first_layer : stage.end_layer]
        num_quantized = sum(self.quantized[stage.first_layer : stage.end_layer])
        matrices = sum(part.num_matrix_params for part in layers) - num_quantized
        matrices += stage.is_last * self.sizes.last.num_matrix_params
        # Each matrix is there twice until all are laid out anew.
        load = weights + self.lays_out(stage.device) * (matrices * self.itemsize + num_quantized)
        # Before they are quantized they are there as numbers, but where a file of such is mapped.
        load = max(load, weights + self._saved_bytes(stage.first_layer, stage.end_layer))
        cache = max(step.num_slots for step in steps) * stage.num_layers * self.slot_bytes
        work = max(
            self.working_bytes(step.num_tokens)
            + stage.is_last * step.num_seqs * self.sizes.vocab_size * 4
            for step in steps
        )
        return max(load, weights + cache + work)

    def layer_s(self, device: str, step: Step, layer: int) -> float:
        speed = self.speeds[device].at(step)
        part, due = self.sizes.layers[layer], step.num_seqs
        num_bytes = part.num_matrix_params * self.itemsize - self._saved_bytes(layer, layer + 1)
        if layer == len(self.sizes.layers) - 1 and due < step.num_tokens:
            # The model's last layer: of the tokens that aren't due keys and values alone.
            early = self._before_attention(part)
            share = early.num_matrix_params / max(1, part.num_matrix_params)
            product_s = self._product_s(device, step, early, step.num_tokens, share * num_bytes)
            product_s += self._product_s(device, step, part, due, num_bytes)
            return product_s + self._layer_ops / 2 * speed.op_s
        product_s = self._product_s(device, step, part, step.num_tokens, num_bytes)
        return product_s + self._layer_ops * speed.op_s + speed.attention_s

    def _before_attention(self, part: Part) -> Part:
        """The products that make queries, keys and values, of a layer's."""
        sizes = self.sizes
        width = sizes.num_heads * sizes.key_size + sizes.slot_elements
        params = min(sizes.hidden_size * width, part.num_matrix_params)
        return Part(params, params, min(params, part.num_active_params))

    @property
    def _layer_ops(self) -> float:
        return LAYER_OPS + _WIDE_OPS * self.sizes.intermediate_size / self.sizes.hidden_size

    def num_ops(self, stage: StageSpec) -> float:
        """Elementwise operations in a stage, those of another width counted by it."""
        return stage.num_layers * self._layer_ops + STAGE_OPS

    def first_s(self, device: str, step: Step) -> float:
        """The embedding: a look-up of a row per token."""
        row_bytes = self.sizes.hidden_size * self.itemsize
        return 2 * step.num_tokens * row_bytes / self.speeds[device].bytes_per_s

    def last_s(self, device: str, step: Step) -> float:
        """The head, for the last token of each sequence."""
        part = self.sizes.last
        return self._product_s(
            device, step, part, step.num_seqs, part.num_matrix_params * self.itemsize
        )

    def stage_s(self, stage: StageSpec, step: Step) -> float:
        """Seconds of a stage in a step."""
        layers = range(stage.first_layer, stage.end_layer)
        total = sum(self.layer_s(stage.device, step, i) for i in layers)
        total += STAGE_OPS * self.speeds[stage.device].at(step).op_s
        if stage.is_first:
            total += self.first_s(stage.device, step)
        return total + (self.last_s(stage.device, step) if stage.is_last else 0.0)

    def device_costs(
        self,
        device: str,
        *,
        cache_bytes: int,
        free_bytes: int,
        num_tokens: int = PREFILL.num_tokens,
        num_seqs: int = DECODE.num_seqs,
    ) -> DeviceCosts:
        """What the strategies cut by: seconds of a decode step, bytes with `cache_bytes` a layer.

        :param num_tokens: of the largest step
        :param num_seqs: of the largest step
        """
        sizes, step = self.sizes, DECODE
        num_layers = len(sizes.layers)
        logit_bytes = num_seqs * sizes.vocab_size * 4
        return DeviceCosts(
            layer_s=[self.layer_s(device, step, i) for i in range(num_layers)],
            # As numbers also where they are quantized: that much loading may take.
            layer_bytes=[p.num_params * self.itemsize + cache_bytes for p in sizes.layers],
            first_s=self.first_s(device, step),
            last_s=self.last_s(device, step),
            first_bytes=sizes.first.num_params * self.itemsize,
            last_bytes=(sizes.last.num_params + self._copied(device)) * self.itemsize + logit_bytes,
            shared_bytes=sizes.shared_params * self.itemsize,
            stage_bytes=sizes.common_params * self.itemsize + self.working_bytes(num_tokens),
            free_bytes=free_bytes,
        )

    def _product_s(
        self, device: str, step: Step, part: Part, num_rows: int, num_bytes: float
    ) -> float:
        """Matrix products of `num_rows` rows: bound by arithmetic, or by reading the weights."""
        speed = self.speeds[device]
        flops = 2 * num_rows * part.num_active_params
        return max(flops / speed.at(step).flops_per_s, num_bytes / speed.bytes_per_s)


def plan_model(
    config: EngineConfig,
    costs: CostModel,
    max_model_len: int,
    free_bytes: Mapping[str, int] | None = None,
) -> PartitionPlan:
    """Cut a model by the strategy of its config.

    `memory` and `mixed` make room for the cache that is asked for. Without a wish it is the
    largest one that any cut has room for, by the engine's own rule, up to what can be used.

    :param free_bytes: by device; what is free now by default
    :raises PartitionError: if no cut fits, or the bounds that were given don't cut the layers
    """
    num_layers = len(costs.sizes.layers)
    devices = config.devices
    if free_bytes is None:
        free_bytes = {name: available_bytes(torch.device(name)) for name in devices}

    def cut(num_slots: int, *, shares: bool) -> PartitionPlan:
        by_device = {}
        for name in devices:
            share = CACHE_SHARE[kind_of(name)] if shares else 1.0
            by_device[name] = costs.device_costs(
                name,
                cache_bytes=math.ceil(num_slots * costs.slot_bytes / share),
                free_bytes=free_bytes[name],
                num_tokens=config.max_batch_tokens,
                num_seqs=config.max_num_seqs,
            )
        return plan_partition(
            num_layers, devices, config.partition, config.layer_bounds, costs=by_device
        )

    if config.partition not in {"memory", "mixed"}:
        return cut(0, shares=False)
    if config.kv_cache_tokens is not None or not config.use_cache:
        return cut(config.kv_cache_tokens or 0, shares=False)
    return _largest(lambda slots: cut(slots, shares=True), config.max_num_seqs * max_model_len)


def _largest(cut: Callable[[int], PartitionPlan], most: int) -> PartitionPlan:
    """The cut for the most cache slots that some cut has room for, to 2 %."""
    try:
        return cut(most)
    except PartitionError:
        best = cut(fits := 1)  # at least one, or the error says what is missing
    while most - fits > max(1, fits // 50):
        middle = (fits + most) // 2
        try:
            best, fits = cut(middle), middle
        except PartitionError:
            most = middle
    return best


def kind_of(device: str) -> str:
    """`cpu` or `cuda`."""
    kind = device.split(":", maxsplit=1)[0]
    return kind if kind in NOMINAL_SPEEDS else "cuda"
