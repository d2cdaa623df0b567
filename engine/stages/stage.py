"""A stage: a slice of an unchanged Hugging Face model, run over packed tokens.

A stage runs in one of two ways, chosen when it is loaded (loading.py):

* packed: one forward over all sequences' tokens, attention through our hook and pool
* single: sequence by sequence, each with a transformers cache of its own; for models that don't
  go through the attention interface or that keep another state (ALiBi, Mamba, …)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from engine.attention.choice import backends_for
from engine.attention.hook import ATTENTION_NAME, AttentionCall, attending
from engine.attention.kv_pool import KVPool, KVShape
from engine.batch import ForwardBatch, Segment
from engine.models.cut_check import hidden_place
from engine.models.last_layer import LastLayer
from engine.models.long_rope import LongRope, Rotation
from engine.models.single_cache import SingleCache
from engine.models.slicing import find_layers, forward_parameters
from engine.plan import StageSpec
from engine.stages.decode_graphs import DecodeGraphs, capture_for
from engine.transfer import moved
from queue_api.wire.errors import UnsupportedModelError

__all__ = ["Mode", "Stage"]

Mode = Literal["packed", "single"]


class Stage:
    """The layers of one `StageSpec` on its device, with their part of every sequence's cache."""

    def __init__(self, model: Any, config: Any, spec: StageSpec, *, use_cache: bool = True) -> None:
        self.spec = spec
        self.model = model
        self.whole_config = config
        """Of the whole model, where `model.config` is of the slice."""
        self.device = torch.device(spec.device)
        self.use_cache = use_cache
        self.mode: Mode = "packed"
        self.backends = backends_for(self.device, model.dtype)
        """Attention backends to try, the fastest first; the last one always works."""
        self.attention = self.backends[0]
        self.pool: KVPool | None = None
        self.kv_shapes: list[KVShape] = []
        self._graphs: DecodeGraphs | None = None
        self._caches: dict[int, SingleCache] = {}
        self._stepwise = False
        self._inbound: torch.Tensor | None = None
        self._outbound: torch.Tensor | None = None
        self.layers: nn.ModuleList = getattr(*find_layers(model))
        self._own_attention = model.config._attn_implementation
        self._takes = forward_parameters(model.base_model)
        self._cache_name = "cache_params" if "cache_params" in self._takes else "past_key_values"
        self._selects_logits = "logits_to_keep" in forward_parameters(model)
        self._embedding_size = _embedding_size(model.config.get_text_config())
        if not spec.is_first:
            self.layers[0].register_forward_pre_hook(self._inject, with_kwargs=True)
        if not spec.is_last:
            self.layers[-1].register_forward_hook(self._capture)
        self.last_layer = LastLayer(self.layers[-1]) if spec.is_last else None
        self.long_rope = LongRope.of(model)
        self._rotation = None if self.long_rope is None else Rotation(model, self.long_rope)
        self.blank_noise = 0.0
        """Stands for the embeddings where a stage has none; nothing may depend on it."""

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def takes_positions(self) -> bool:
        """Whether the model is told its tokens' positions."""
        return "position_ids" in self._takes

    @property
    def tolerance(self) -> float:
        """Packed or not, sums run in another order; half precision rounds them coarsely."""
        return 1e-3 if self.dtype == torch.float32 else 5e-2

    @property
    def slot_bytes(self) -> int:
        """Bytes that one token takes in this stage's pool."""
        return sum(shape.slot_bytes(self.dtype) for shape in self.kv_shapes)

    def allocate(self, num_slots: int) -> None:
        """Make the pool. A stage that runs sequences singly, or without a cache, has none."""
        if self.mode != "packed" or not self.use_cache:
            return
        whole = self.spec.is_first and self.spec.is_last
        # A graph would keep the factors that its capture chose.
        capturable = whole and self.attention.capturable and self._rotation is None
        capture = capture_for(self.device) if capturable else None
        self.pool = self.make_pool(num_slots + (capture is not None))
        if capture is not None:
            self._graphs = DecodeGraphs(
                self._run_eagerly,
                capture,
                device=self.device,
                scratch_slot=num_slots,
                tolerance=self.tolerance,
            )

    def make_pool(self, num_slots: int) -> KVPool:
        """A cache of this stage's layers, as its attention wants it."""
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

    def release_all(self) -> None:
        """Forget it for all sequences."""
        self._caches.clear()

    def set_mode(self, mode: Mode, *, stepwise: bool = False) -> None:
        """Switch the attention, and see that a single cache counts the stage's own layers.

        :param stepwise: single tokens only behind a past
        """
        self._stepwise = stepwise
        if mode == "single" and not stepwise:
            inner: Iterator[Any] = (m for layer in self.layers for m in layer.modules())
            for module in inner:
                for name in ("layer_idx", "layer_id"):
                    if isinstance(index := getattr(module, name, None), int):
                        setattr(module, name, index - self.spec.first_layer)
        self.mode = mode
        chosen = ATTENTION_NAME if mode == "packed" else self._own_attention
        for module in self.model.modules():
            own: Any = getattr(module, "config", None)
            if hasattr(own, "_attn_implementation"):
                own._attn_implementation = chosen

    @torch.inference_mode()
    def run(self, batch: ForwardBatch, inbound: torch.Tensor) -> torch.Tensor:
        """Run the batch through this stage.

        :param inbound: token ids [1, T] for the first stage, else hidden states [1, T, E]
        :returns: hidden states [1, T, E]; from the last stage the due logits [B, V]
        """
        if self.mode != "packed":
            return self.run_singly(batch, moved(inbound, self.device))
        if self.pool is not None:
            self.pool.copy(batch.copies)
        if self._graphs is not None and (logits := self._graphs.run(batch)) is not None:
            return logits
        return self.run_packed(batch, moved(inbound, self.device), self.pool)[0]

    def _run_eagerly(self, batch: ForwardBatch) -> torch.Tensor:
        """The logits [B, V] of a stage that is the whole model."""
        return self.run_packed(batch, moved(batch.token_ids[None], self.device), self.pool)[0]

    # ------------------------------------------------------------------------- the two ways

    def run_packed(
        self, batch: ForwardBatch, inbound: torch.Tensor, pool: KVPool | None
    ) -> tuple[torch.Tensor, AttentionCall]:
        """All sequences in one forward; its output, and what attention was asked."""
        positions, _, logit_rows = batch.on(self.device)
        call = AttentionCall(batch, pool, self.spec.first_layer, self.attention)
        # The mask of ones keeps transformers from reading sequence bounds out of the positions.
        ones = torch.ones(1, batch.num_tokens, dtype=torch.bool, device=self.device)
        with attending(call), self.rotating(batch.segments, batch.positions):
            out = self.forward(inbound, positions[None], logit_rows, attention_mask=ones)
        return out, call

    @contextmanager
    def rotating(self, segments: Sequence[Segment], positions: torch.Tensor) -> Iterator[None]:
        """Rotate each token of `segments`, at `positions` [T], by its sequence's factors."""
        if self._rotation is None:
            yield
            return
        with self._rotation.choosing(segments, positions, self.device):
            yield

    def run_singly(self, batch: ForwardBatch, inbound: torch.Tensor) -> torch.Tensor:
        """Sequence by sequence, each with a cache of its own; the output is as that of `run`."""
        positions, _, logit_rows = batch.on(self.device)
        due = set(logit_rows.tolist())
        outputs = []
        for segment in batch.segments:
            if self.use_cache and segment.past == 0:
                self._caches[segment.number] = SingleCache(self.whole_config, self.spec)
            end = segment.start + segment.count
            step = 1 if self._stepwise and segment.past else segment.count
            for start in range(segment.start, end, step):
                rows = slice(start, start + step)
                past = segment.past + start - segment.start
                due_here = [i for i in range(step) if start + i in due]
                part = replace(segment, start=0, count=step, past=past)
                with self.rotating([part], batch.positions[rows]):
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
        return self.forward_with(cache, inbound, positions, due_rows)

    def forward_with(
        self,
        cache: SingleCache | None,
        inbound: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor,
    ) -> torch.Tensor:
        """The model's forward behind what `cache` holds."""
        kwargs = {self._cache_name: cache, "use_cache": cache is not None}
        return self.forward(inbound, positions, logit_rows, **kwargs)

    def forward(
        self,
        inbound: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The model's forward: `inbound` [1, n] or [1, n, E], `positions` [1, n]."""
        kwargs = {"use_cache": False, **kwargs}
        if self.takes_positions:
            kwargs["position_ids"] = positions
        if self.spec.is_first:
            kwargs["input_ids"] = inbound
        else:
            # What the model computes ahead of its layers runs on zeros; `_inject` replaces it.
            self._inbound = inbound
            shape = (1, positions.shape[1], self._embedding_size)
            kwargs["inputs_embeds"] = torch.full(
                shape, self.blank_noise, dtype=self.dtype, device=self.device
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
        place = hidden_place(self.layers[0])
        return (*args[:place], self._inbound, *args[place + 1 :]), kwargs

    def _capture(self, _module: nn.Module, _args: object, out: Any) -> None:
        self._outbound = out[0] if isinstance(out, tuple) else out


def _embedding_size(config: Any) -> int:
    for name in ("embedding_size", "input_embedding_size", "word_embed_proj_dim", "hidden_size"):
        if size := getattr(config, name, None):
            return int(size)
    raise UnsupportedModelError(f"{type(config).__name__} names no hidden size")
