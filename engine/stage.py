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
from transformers.cache_utils import CacheLayerMixin

from engine.attention import ATTENTION_NAME, AttentionCall, attending
from engine.attention_check import AttentionMismatchError, Heads, check_attention
from engine.attention_choice import backends_for
from engine.batch import ForwardBatch
from engine.checkpoint import Checkpoint
from engine.cut_check import LayerInputs, hidden_place
from engine.decode_graphs import DecodeGraphs, capture_for
from engine.fused_layers import fuse_layers
from engine.int8_weights import round_linears
from engine.kv_cache import KVPool, KVShape
from engine.last_layer import LastLayer
from engine.packed_linear import can_pack, pack_linears
from engine.partition import StageSpec
from engine.probe import CHECKED_ROWS, PROBE_LENGTH, PROBE_SLOTS, probe_steps, whole_probe
from engine.slicing import Absent, find_layers, forward_parameters, load_slice
from engine.transfer import moved
from queue_api.errors import EngineError, UnsupportedModelError

__all__ = ["Stage"]

logger = logging.getLogger(__name__)

PACKABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Their rotation depends on the longest position in the batch, so on a sequence's neighbours.
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class Stage:
    """The layers of one `StageSpec` on its device, with their part of every sequence's cache."""

    def __init__(self, model: Any, config: Any, spec: StageSpec, *, use_cache: bool = True) -> None:
        self.spec = spec
        self.model = model
        self._whole_config = config
        self.device = torch.device(spec.device)
        self.use_cache = use_cache
        self.mode: Literal["packed", "single"] = "packed"
        self._backends = backends_for(self.device, model.dtype)
        self.attention = self._backends[0]
        self.pool: KVPool | None = None
        self.kv_shapes: list[KVShape] = []
        self._graphs: DecodeGraphs | None = None
        self._caches: dict[int, StageCache] = {}
        self._stepwise = False
        self._inbound: torch.Tensor | None = None
        self._outbound: torch.Tensor | None = None
        self._layers: Sequence[nn.Module] = getattr(*find_layers(model))
        self._own_attention = model.config._attn_implementation
        self._takes = forward_parameters(model.base_model)
        self._cache_name = "cache_params" if "cache_params" in self._takes else "past_key_values"
        self._selects_logits = "logits_to_keep" in forward_parameters(model)
        self._embedding_size = _embedding_size(model.config.get_text_config())
        if not spec.is_first:
            self._layers[0].register_forward_pre_hook(self._inject, with_kwargs=True)
        if not spec.is_last:
            self._layers[-1].register_forward_hook(self._capture)
        self._last_layer = LastLayer(self._layers[-1]) if spec.is_last else None
        self._blank_noise = 0.0

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: Any,
        spec: StageSpec,
        dtype: torch.dtype,
        *,
        use_cache: bool = True,
        int8: bool = False,
        trust_remote_code: bool = False,
    ) -> Stage:
        """Load a stage and settle how it runs.

        :param int8: round the layers' weights
        :raises UnsupportedModelError: if neither way gives what the model itself gives
        """
        for pack in (True, False) if can_pack(torch.device(spec.device), dtype) else (False,):
            model = load_slice(checkpoint, config, spec, dtype, trust_remote_code=trust_remote_code)
            stage = cls(model, config, spec, use_cache=use_cache)
            if int8:
                stage.round_weights()
            try:
                stage.choose_mode(pack_weights=pack)
            except UnsupportedModelError:
                if not pack:
                    raise
                continue
            if stage.mode == "packed":
                break
        return stage

    def round_weights(self) -> None:
        """Round the layers' weights to int8, before anything is computed with them.

        :raises UnsupportedModelError: if there are none that can be
        """
        total = sum(weight.numel() for layer in self._layers for weight in layer.parameters())
        num_rounded = round_linears(self._layers)
        if not num_rounded:
            raise UnsupportedModelError(
                f"the layers of {type(self.model).__name__} have no nn.Linear to round to int8"
            )
        logger.info(
            "stage %d on %s: %.0f %% of the layers' weights rounded to int8",
            *(self.spec.index, self.device, 100 * num_rounded / total),
        )

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
        if self.mode != "packed" or not self.use_cache:
            return
        whole = self.spec.is_first and self.spec.is_last
        capture = capture_for(self.device) if whole and self.attention.capturable else None
        self.pool = self._make_pool(num_slots + (capture is not None))
        if capture is not None:
            self._graphs = DecodeGraphs(
                self._run_eagerly,
                capture,
                device=self.device,
                scratch_slot=num_slots,
                tolerance=self._tolerance,
            )

    def _make_pool(self, num_slots: int) -> KVPool:
        return KVPool(
            self.kv_shapes,
            num_slots,
            device=self.device,
            dtype=self.dtype,
            token_major=self.attention.token_major,
        )

    def release(self, number: int) -> None:
        """Forget what is kept for a sequence outside the pool."""
        self._caches.pop(number, None)

    @torch.inference_mode()
    def run(self, batch: ForwardBatch, inbound: torch.Tensor) -> torch.Tensor:
        """Run the batch through this stage.

        :param inbound: token ids [1, T] for the first stage, else hidden states [1, T, E]
        :returns: hidden states [1, T, E]; from the last stage the due logits [B, V]
        """
        if self.mode != "packed":
            return self._run_singly(batch, moved(inbound, self.device))
        if self.pool is not None:
            self.pool.copy(batch.copies)
        if self._graphs is not None and (logits := self._graphs.run(batch)) is not None:
            return logits
        return self._run_packed(batch, moved(inbound, self.device), self.pool)[0]

    def _run_eagerly(self, batch: ForwardBatch) -> torch.Tensor:
        """The logits [B, V] of a stage that is the whole model."""
        return self._run_packed(batch, moved(batch.token_ids[None], self.device), self.pool)[0]

    # ------------------------------------------------------------------------- the two ways

    def _run_packed(
        self, batch: ForwardBatch, inbound: torch.Tensor, pool: KVPool | None
    ) -> tuple[torch.Tensor, AttentionCall]:
        positions, _, logit_rows = batch.on(self.device)
        call = AttentionCall(batch, pool, self.spec.first_layer, self.attention)
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
            if self.use_cache and segment.past == 0:
                self._caches[segment.number] = StageCache(self._whole_config, self.spec)
            end = segment.start + segment.count
            step = 1 if self._stepwise and segment.past else segment.count
            for start in range(segment.start, end, step):
                rows = slice(start, start + step)
                past = segment.past + start - segment.start
                due_here = [i for i in range(step) if start + i in due]
                out = self._run_one(
                    inbound[:, rows], positions[None, rows], segment.number, past, due_here
                )
                if not self.spec.is_last or due_here:
                    outputs.append(out)
        if self.spec.is_last:
            vocabulary = self.model.config.get_text_config().vocab_size
            if not outputs:
                return inbound.new_empty(0, vocabulary)
            return torch.cat(outputs)[logit_rows.argsort().argsort()]  # as logit_rows has them
        return torch.cat(outputs, dim=1)

    def _run_one(
        self,
        inbound: torch.Tensor,
        positions: torch.Tensor,
        number: int,
        past: int,
        due: list[int],
    ) -> torch.Tensor:
        """Tokens of one sequence, with its own cache; logits [B, V] of those due, or the last's."""
        cache = self._caches[number] if self.use_cache else None
        if cache is not None:
            cache.num_seen = past
        due_rows = torch.tensor(due or [inbound.shape[1] - 1], device=self.device)
        kwargs = {self._cache_name: cache, "use_cache": self.use_cache}
        return self._forward(inbound, positions, due_rows, **kwargs)

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
            shape = (1, positions.shape[1], self._embedding_size)
            kwargs["inputs_embeds"] = torch.full(
                shape, self._blank_noise, dtype=self.dtype, device=self.device
            )
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
        place = hidden_place(self._layers[0])
        return (*args[:place], self._inbound, *args[place + 1 :]), kwargs

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
        try:
            expected = self._expected(inbound)
        except UnsupportedModelError:
            raise
        except Exception as problem:  # any model code may fail in any way
            raise UnsupportedModelError(
                f"{type(self.model).__name__} can't run as a stage "
                f"({type(problem).__name__}: {problem})"
            ) from problem
        if pack_weights:
            pack_linears(self.model)
            fuse_layers(self.model)
        reasons: list[str] = []
        for backend in self._backends:
            self.attention = backend
            failure = self._try_packed(inbound, expected)
            if failure is None:
                where = f"stage {self.spec.index} on {self.device}"
                logger.info("%s: attention by %s", where, backend.name)
                if reasons:
                    logger.warning("%s: slower attention, not %s", where, "; ".join(reasons))
                return
            anyway = isinstance(failure, UnsupportedModelError)  # whoever attends
            how = "packed" if anyway or backend is self._backends[-1] else f"by {backend.name}"
            reasons.append(f"{how}: {_said(failure)}")
            if anyway:
                break
        for stepwise in (False, True):
            failure = self._try(inbound, expected, "single", stepwise=stepwise)
            if failure is None:
                logger.warning("sequences run one by one in this model (%s)", reasons[0])
                return
            reasons.append(f"single: {_said(failure)}")
        raise UnsupportedModelError(
            f"{type(self.model).__name__} can't run here without being wrong: {'; '.join(reasons)}"
        )

    @property
    def _tolerance(self) -> float:
        """Packed or not, sums run in another order; half precision rounds them coarsely."""
        return 1e-3 if self.dtype == torch.float32 else 5e-2

    def _try_packed(self, inbound: torch.Tensor, expected: torch.Tensor) -> Exception | None:
        """As `_try`, the last layer without what nobody reads or, if that is wrong, with it."""
        if self._last_layer is None:
            return self._try(inbound, expected, "packed", stepwise=False)
        self._last_layer.trims = True
        failure = self._try(inbound, expected, "packed", stepwise=False)
        if failure is None:
            return None
        self._last_layer.trims = False
        other = self._try(inbound, expected, "packed", stepwise=False)
        if other is None:
            logger.info("the last layer computes all tokens: %s", _said(failure))
        return other

    def _try(
        self,
        inbound: torch.Tensor,
        expected: torch.Tensor,
        mode: Literal["packed", "single"],
        *,
        stepwise: bool,
    ) -> Exception | None:
        """Run the probe in a mode; what is wrong with it, None if nothing is."""
        try:
            self._set_mode(mode, stepwise=stepwise)
            error = _relative_error(self._probe(inbound), expected)
        except CacheMismatchError:
            raise
        except Exception as problem:  # any model code may fail in any way
            return problem
        finally:
            self._caches.clear()
        if error <= self._tolerance:
            logger.debug("stage %s: %s, error %.1e", self.spec.index, mode, error)
            return None
        return WrongOutputError(f"output is off by {error:.1e}")

    def _expected(self, inbound: torch.Tensor) -> torch.Tensor:
        """What the model itself makes of the probe, in its checked rows.

        :raises UnsupportedModelError: if its layers need more than hidden states from other stages
        """
        absent = [module for module in self.model.modules() if isinstance(module, Absent)]
        early: list[int] = []
        hook = self._layers[0].register_forward_pre_hook(
            lambda *_: early.append(sum(module.num_calls for module in absent))
        )
        with LayerInputs(self._layers) as inputs:
            expected = self._whole(inbound)
        hook.remove()
        if self.spec.is_first and self.spec.is_last:
            return expected
        name = type(self.model).__name__
        if self.spec.is_first and early[0]:
            raise UnsupportedModelError(f"{name} needs modules of other stages before its layers")
        with LayerInputs(self._layers) as others:
            self._blank_noise = 1.0
            self._whole(inbound.flip(1))
        noisy = self._whole(inbound)
        self._blank_noise = 0.0
        if (strange := inputs.strange()) or (strange := inputs.differ(others)):
            raise UnsupportedModelError(f"{name}: layers pass on {strange} besides hidden states")
        if _relative_error(noisy, expected) > 1e-5:
            raise UnsupportedModelError(f"{name}: all layers need the embeddings")
        return expected

    def _whole(self, inbound: torch.Tensor) -> torch.Tensor:
        """The model's own output for the probe in one go, in its checked rows."""
        positions = torch.arange(PROBE_LENGTH, device=self.device)
        ones = torch.ones(1, PROBE_LENGTH, dtype=torch.bool, device=self.device)
        out = self._forward(inbound, positions[None], positions, attention_mask=ones)
        return out.reshape(PROBE_LENGTH, -1)[CHECKED_ROWS]

    def _set_mode(self, mode: Literal["packed", "single"], *, stepwise: bool) -> None:
        """Switch the attention, and see that a single cache counts the stage's own layers."""
        self._stepwise = stepwise
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
                for name in ("layer_idx", "layer_id"):
                    if isinstance(index := getattr(module, name, None), int) and not stepwise:
                        setattr(module, name, index - self.spec.first_layer)
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
                pool = self._make_pool(PROBE_SLOTS)
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
        self._check_windows(call)
        if self.attention is not self._backends[-1]:
            layers = (
                Heads(call.num_heads[i], call.shapes[i], call.rules[i]) for i in range(num_layers)
            )
            check_attention(self.attention, layers, self.device, self.dtype)
        return [call.shapes[i] for i in range(num_layers)]

    def _check_windows(self, call: AttentionCall) -> None:
        """See that transformers' cache, which `generate` uses, keeps what the masks show.

        :raises UnsupportedModelError: if it would drop tokens within the length of a text
        """
        text = self._whole_config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None)
        layers = StageCache(self._whole_config, self.spec).layers
        for i, layer in enumerate(layers):
            kept = getattr(layer, "sliding_window", None)
            rule = call.rules[i]
            if kept not in {None, rule.window, rule.chunk} and not (longest and kept >= longest):
                raise CacheMismatchError(
                    f"{type(self.model).__name__}: transformers' cache keeps {kept} tokens, "
                    f"but the masks of layer {i} show {rule.window or rule.chunk or 'all'}"
                )


class WrongOutputError(EngineError):
    """A way to run a stage gives something else than the model's own forward."""


class CacheMismatchError(UnsupportedModelError):
    """A model's text depends on whether it has a cache: nothing to be equal to."""


class StageCache(DynamicCache):
    """transformers' cache of a stage's layers, which can tell its length without attention, too."""

    def __init__(self, config: Any, spec: StageSpec) -> None:
        super().__init__(config=config)
        # Cut, not made for the stage: configs describe their layers in all sorts of ways.
        self.layers = self.layers[spec.first_layer : spec.end_layer]
        self.num_seen = 0
        """Tokens before the ones that are run now; set by the stage."""

    @property
    def _counts(self) -> bool:
        return any(isinstance(layer, CacheLayerMixin) for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self.layers and not self._counts:
            return self.num_seen
        return int(super().get_seq_length(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self.layers and not self._counts:
            return self.num_seen + query_length, 0
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes


def _said(failure: Exception) -> str:
    ours = isinstance(failure, WrongOutputError | AttentionMismatchError)
    return str(failure) if ours else f"{type(failure).__name__}: {failure}"


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
