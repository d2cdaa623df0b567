"""A stage: a slice of an unchanged Hugging Face model, run over packed tokens.

A stage runs in one of two ways, chosen when it is loaded by comparing its output with that of
the model's own forward:

* packed: one forward over all sequences' tokens, attention through our hook and pool
* single: sequence by sequence, each with a transformers cache of its own; for models that don't
  go through the attention interface or that keep another state (ALiBi, Mamba, …)

Whatever fits neither is refused: better no text than wrong text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache

from engine.attention import ATTENTION_NAME, AttentionCall, attending
from engine.batch import ForwardBatch
from engine.checkpoint import Checkpoint
from engine.kv_cache import KVPool, KVShape
from engine.packed_linear import can_pack, pack_linears
from engine.partition import StageSpec
from engine.probe import CHECKED_ROWS, PROBE_LENGTH, PROBE_SLOTS, probe_steps, whole_probe
from engine.slicing import find_layers, forward_parameters, load_slice
from queue_api.errors import UnsupportedModelError

__all__ = ["Stage"]

logger = logging.getLogger(__name__)

PACKABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Their rotation depends on the longest position in the batch, so on a sequence's neighbours.
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class Stage:
    """The layers of one `StageSpec` on its device, with their part of every sequence's cache."""

    def __init__(self, model: Any, spec: StageSpec, *, use_cache: bool = True) -> None:
        self.spec = spec
        self.model = model
        self.device = torch.device(spec.device)
        self.use_cache = use_cache
        self.mode: Literal["packed", "single"] = "packed"
        self.pool: KVPool | None = None
        self.kv_shapes: list[KVShape] = []
        self._caches: dict[int, DynamicCache] = {}
        self._inbound: torch.Tensor | None = None
        self._outbound: torch.Tensor | None = None
        self._layers: Sequence[nn.Module] = getattr(*find_layers(model))
        self._own_attention = model.config._attn_implementation
        self._takes = forward_parameters(model.base_model)
        self._selects_logits = "logits_to_keep" in forward_parameters(model)
        self._embedding_size = _embedding_size(model.config.get_text_config())
        if not spec.is_first:
            self._layers[0].register_forward_pre_hook(self._inject, with_kwargs=True)
        if not spec.is_last:
            self._layers[-1].register_forward_hook(self._capture)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: Any,
        spec: StageSpec,
        dtype: torch.dtype,
        *,
        use_cache: bool = True,
        trust_remote_code: bool = False,
    ) -> Stage:
        """Load a stage and settle how it runs.

        :raises UnsupportedModelError: if neither way gives what the model itself gives
        """
        for pack in (True, False) if can_pack(torch.device(spec.device), dtype) else (False,):
            model = load_slice(checkpoint, config, spec, dtype, trust_remote_code=trust_remote_code)
            stage = cls(model, spec, use_cache=use_cache)
            try:
                stage.choose_mode(pack_weights=pack)
            except UnsupportedModelError:
                if not pack:
                    raise
                continue
            if stage.mode == "packed":
                break
        return stage

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def slot_bytes(self) -> int:
        """Bytes that one token takes in this stage's pool."""
        return sum(shape.slot_bytes(self.dtype) for shape in self.kv_shapes)

    def allocate(self, num_slots: int) -> None:
        """Make the pool. A stage that runs sequences singly, or without a cache, has none."""
        if self.mode == "packed" and self.use_cache:
            self.pool = KVPool(self.kv_shapes, num_slots, device=self.device, dtype=self.dtype)

    def release(self, number: int) -> None:
        """Forget what is kept for a sequence outside the pool."""
        self._caches.pop(number, None)

    @torch.inference_mode()
    def run(self, batch: ForwardBatch, inbound: torch.Tensor) -> torch.Tensor:
        """Run the batch through this stage.

        :param inbound: token ids [1, T] for the first stage, else hidden states [1, T, E]
        :returns: hidden states [1, T, E]; from the last stage the due logits [B, V]
        """
        inbound = inbound.to(self.device, non_blocking=True)
        if self.mode == "packed":
            return self._run_packed(batch, inbound, self.pool)[0]
        return self._run_singly(batch, inbound)

    # ------------------------------------------------------------------------- the two ways

    def _run_packed(
        self, batch: ForwardBatch, inbound: torch.Tensor, pool: KVPool | None
    ) -> tuple[torch.Tensor, AttentionCall]:
        positions, _, logit_rows = batch.on(self.device)
        call = AttentionCall(batch, pool, self.spec.first_layer)
        # The mask of ones keeps transformers from reading sequence bounds out of the positions.
        ones = torch.ones(1, batch.num_tokens, dtype=torch.bool, device=self.device)
        with attending(call):
            out = self._forward(inbound, positions[None], logit_rows, attention_mask=ones)
        return out, call

    def _run_singly(self, batch: ForwardBatch, inbound: torch.Tensor) -> torch.Tensor:
        positions, _, logit_rows = batch.on(self.device)
        due = set(logit_rows.tolist())
        outputs = []
        for segment in batch.segments:
            end = segment.start + segment.count
            cache = None
            if self.use_cache:
                if segment.past == 0:
                    self._caches[segment.number] = DynamicCache(config=self.model.config)
                cache = self._caches[segment.number]
            last_row = torch.tensor([segment.count - 1], device=self.device)
            out = self._forward(
                inbound[:, segment.start : end],
                positions[None, segment.start : end],
                last_row,
                past_key_values=cache,
                use_cache=self.use_cache,
            )
            if not self.spec.is_last or end - 1 in due:
                outputs.append(out)
        if self.spec.is_last:
            vocabulary = self.model.config.get_text_config().vocab_size
            return torch.cat(outputs) if outputs else inbound.new_empty(0, vocabulary)
        return torch.cat(outputs, dim=1)

    def _forward(
        self,
        inbound: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The model's forward: `inbound` [1, n] or [1, n, E], `positions` [1, n]."""
        kwargs = {"use_cache": False, **kwargs}
        if "position_ids" in self._takes:
            kwargs["position_ids"] = positions
        if self.spec.is_first:
            kwargs["input_ids"] = inbound
        else:
            # What the model computes ahead of its layers runs on zeros; `_inject` replaces it.
            self._inbound = inbound
            blank = torch.zeros(1, 1, self._embedding_size, dtype=self.dtype, device=self.device)
            kwargs["inputs_embeds"] = blank.expand(1, positions.shape[1], -1)
        if not self.spec.is_last:
            self.model.base_model(**kwargs)
            out, self._outbound = self._outbound, None
            assert out is not None
            return out
        if self._selects_logits:
            logits: torch.Tensor = self.model(**kwargs, logits_to_keep=logit_rows).logits
            return logits[0]
        return self.model(**kwargs).logits[0, logit_rows]  # type: ignore[no-any-return]

    def _inject(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": self._inbound}
        return (self._inbound, *args[1:]), kwargs

    def _capture(self, _module: nn.Module, _args: object, out: Any) -> None:
        self._outbound = out[0] if isinstance(out, tuple) else out

    # --------------------------------------------------------------------------- the choice

    @torch.inference_mode()
    def choose_mode(self, *, pack_weights: bool = False) -> None:
        """Compare both ways with the model's own forward on a short probe; keep the first right.

        :param pack_weights: lay out the weights for the CPU once the model's own output is known
        :raises UnsupportedModelError: if neither is
        """
        inbound = self._probe_input()
        positions = torch.arange(PROBE_LENGTH, device=self.device)
        ones = torch.ones(1, PROBE_LENGTH, dtype=torch.bool, device=self.device)
        expected = self._forward(inbound, positions[None], positions, attention_mask=ones)
        expected = expected.reshape(PROBE_LENGTH, -1)[CHECKED_ROWS]
        if pack_weights:
            pack_linears(self.model)
        reasons = []
        for mode in ("packed", "single"):
            try:
                self._set_mode(mode)
                error = _relative_error(self._probe(inbound), expected)
            except Exception as problem:  # any model code may fail in any way
                reasons.append(f"{mode}: {type(problem).__name__}: {problem}")
                continue
            finally:
                self._caches.clear()
            # Packed or not, sums run in another order; half precision rounds them coarsely.
            if error <= (1e-3 if self.dtype == torch.float32 else 5e-2):
                logger.debug("stage %s: %s, error %.1e", self.spec.index, mode, error)
                if mode == "single":
                    logger.warning("sequences run one by one in this model (%s)", reasons[0])
                return
            reasons.append(f"{mode}: output is off by {error:.1e}")
        raise UnsupportedModelError(
            f"{type(self.model).__name__} can't run here without being wrong: {'; '.join(reasons)}"
        )

    def _set_mode(self, mode: Literal["packed", "single"]) -> None:
        """Switch the attention, and see that a single cache counts the stage's own layers."""
        config = self.model.config
        text = config.get_text_config()
        if mode == "packed":
            if not set(getattr(text, "layer_types", None) or ()) <= PACKABLE_LAYERS:
                raise UnsupportedModelError("layers that keep another state than K and V")
            if _rope_types(text) & BATCH_DEPENDENT_ROPE:
                raise UnsupportedModelError("positions that depend on the batch's longest text")
        else:
            inner: Iterator[Any] = (m for layer in self._layers for m in layer.modules())
            for module in inner:
                if isinstance(index := getattr(module, "layer_idx", None), int):
                    module.layer_idx = index - self.spec.first_layer
        self.mode = mode
        chosen = ATTENTION_NAME if mode == "packed" else self._own_attention
        for module in self.model.modules():
            own: Any = getattr(module, "config", None)
            if hasattr(own, "_attn_implementation"):
                own._attn_implementation = chosen

    def _probe_input(self) -> torch.Tensor:
        if self.spec.is_first:
            vocabulary = self.model.config.get_text_config().vocab_size
            tokens = torch.arange(PROBE_LENGTH, device=self.device)[None] * 7
            return tokens.remainder(vocabulary)
        size = self.model.config.get_text_config().hidden_size
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, PROBE_LENGTH, size, generator=generator)
        return hidden.to(self.device, self.dtype)

    def _probe(self, inbound: torch.Tensor) -> torch.Tensor:
        """Output of the probe's checked rows, run in two steps next to another sequence."""
        pool = None
        if self.mode == "packed":
            self.kv_shapes = self._hooked_shapes(inbound)
            if self.use_cache:
                pool = KVPool(self.kv_shapes, PROBE_SLOTS, device=self.device, dtype=self.dtype)
        outputs = []
        for step in probe_steps(use_cache=self.use_cache):
            packed = inbound[:, step.source.to(self.device)]
            if self.mode == "packed":
                out = self._run_packed(step.batch, packed, pool)[0]
            else:
                out = self._run_singly(step.batch, packed)
            rows = out if self.spec.is_last else out[0, step.batch.on(self.device)[2]]
            outputs.append(rows)
        return torch.cat(outputs)

    def _hooked_shapes(self, inbound: torch.Tensor) -> list[KVShape]:
        """The shape of each layer's K and V.

        :raises UnsupportedModelError: if attention isn't called exactly once per layer
        """
        _, call = self._run_packed(whole_probe(), inbound, None)
        num_layers = len(self._layers)
        if call.num_calls != num_layers or sorted(call.shapes) != list(range(num_layers)):
            raise UnsupportedModelError(f"{call.num_calls} attention calls in {num_layers} layers")
        return [call.shapes[i] for i in range(num_layers)]


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.float() - expected.float()).norm(dim=-1)
    return float((difference / expected.float().norm(dim=-1)).max())


def _embedding_size(config: Any) -> int:
    for name in ("embedding_size", "input_embedding_size", "word_embed_proj_dim", "hidden_size"):
        if size := getattr(config, name, None):
            return int(size)
    raise UnsupportedModelError(f"{type(config).__name__} names no hidden size")


def _rope_types(config: Any) -> set[str]:
    """All rotary variants in the config, one for the model or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    entries = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(entry["rope_type"]) for entry in entries if "rope_type" in entry}
