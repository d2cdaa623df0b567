"""LongRoPE: rotate each token by short or long factors as the length of its own sequence has it.

transformers chooses one of the two for a whole forward, by the longest position in it, so what a
token gets depends on what runs with it: a prompt's first chunk would get the short factors though
the prompt is long, and a short sequence beside a long one the long factors. Here the choice is made
per token. What `generate` gives, the border being the longest sequence that the short factors are
for::

    prompt longer than the border       long, all of it and all new tokens
    sequence within it                  short
    sequence grows past the border      models that recompute it there (Phi): long, all of it
                                        others: short up to the border, long behind it

The factors themselves are the model's own: its module is asked for positions that make it choose.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.batch import Segment
from engine.transfer import moved
from queue_api.wire.errors import UnsupportedModelError

__all__ = ["LongRope", "Rotation", "rope_entries"]

KIND = "longrope"


@dataclass(frozen=True)
class LongRope:
    """When a sequence is rotated by the long factors."""

    border: int
    """Tokens of the longest sequence that the short factors are for."""
    recomputes: bool
    """`generate` recomputes a sequence, by the long factors, when it grows past the border."""

    def is_long(self, num_prompt: int, num_tokens: int) -> bool:
        """Whether a sequence has the long factors from its first token on."""
        return (num_tokens if self.recomputes else num_prompt) > self.border

    @classmethod
    def of(cls, model: Any) -> LongRope | None:
        """The model's; None if its positions aren't LongRoPE's.

        :raises UnsupportedModelError: if its layers have different borders, or its `generate`
            can't be asked what it does at the border
        """
        entries = rope_entries(model.config.get_text_config())
        borders = {
            int(entry["original_max_position_embeddings"])
            for entry in entries
            if entry.get("rope_type") == KIND
        }
        if not borders:
            return None
        if len(borders) > 1:
            raise UnsupportedModelError(
                f"LongRoPE with several original_max_position_embeddings: {sorted(borders)}"
            )
        border = borders.pop()
        return cls(border, _recomputes(model, border))


class Rotation:
    """A stage's rotary modules, told for each token which factors it gets.

    :raises UnsupportedModelError: if the model has no such module
    """

    def __init__(self, model: nn.Module, rope: LongRope) -> None:
        self._border = rope.border
        self._is_long: torch.Tensor | None = None  # [T] bool; None: the model's own choice
        self._is_mixed = False
        wrapped = [m for m in model.modules() if KIND in _kinds(m)]
        if not wrapped:
            raise UnsupportedModelError("LongRoPE by a module that isn't transformers'")
        for module in wrapped:
            self._wrap(module)

    @contextmanager
    def choosing(
        self, segments: Sequence[Segment], positions: torch.Tensor, device: torch.device
    ) -> Iterator[None]:
        """Rotate by the factors of each segment's sequence.

        :param positions: [T], on the CPU
        """
        counts = torch.tensor([segment.count for segment in segments])
        whole = torch.tensor([segment.is_long for segment in segments])
        is_long = whole.repeat_interleave(counts) | (positions >= self._border)
        self._is_mixed = bool(is_long.any()) and not bool(is_long.all())
        self._is_long = moved(is_long, device) if self._is_mixed else is_long
        try:
            yield
        finally:
            self._is_long = None

    def _wrap(self, module: nn.Module) -> None:
        own = module.forward

        @functools.wraps(own)
        def forward(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            layer_type = kwargs.get("layer_type", args[0] if args else None)
            if self._is_long is None or KIND not in _kinds(module, layer_type):
                return own(x, position_ids, *args, **kwargs)
            return self._rotate(
                lambda positions: own(x, positions, *args, **kwargs), position_ids, self._is_long
            )

        module.forward = forward

    def _rotate(self, own: Any, positions: torch.Tensor, is_long: torch.Tensor) -> Any:
        """Cosines and sines [..., T, D] for `positions` [..., T], of which `is_long` [T]."""
        if positions.shape[-1] != len(is_long):
            raise UnsupportedModelError("a rotation of some of the tokens alone")
        if not self._is_mixed and not bool(is_long[0]):
            return own(positions)
        # One position behind the border makes the module choose the long factors for all.
        behind = torch.full_like(positions[..., :1], self._border)
        long = own(torch.cat([positions, behind], dim=-1))
        long = _each(lambda part: part[..., :-1, :], long)
        if not self._is_mixed:
            return long
        short = own(positions.clamp(max=self._border - 1))
        return _each(lambda a, b: torch.where(is_long[:, None], a, b), long, short)


def rope_entries(text_config: Any) -> list[dict[str, Any]]:
    """The config's rotary parameters: of the whole model, and of each layer type."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    return [parameters, *(value for value in parameters.values() if isinstance(value, dict))]


def _each(function: Any, *results: Any) -> Any:
    """`function` of tensors, or of each place in tuples of them."""
    if isinstance(results[0], tuple):
        return tuple(function(*parts) for parts in zip(*results, strict=True))
    return function(*results)


def _kinds(module: nn.Module, layer_type: str | None = None) -> set[str]:
    """The rotary variants of a module, or the one of a layer type."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return set(kinds.values()) if layer_type is None else {kinds[layer_type]}
    return {kinds} if isinstance(kinds, str) else set()


class _FullCache:
    """Says that it holds a sequence that is as long as the border."""

    is_compileable = False

    def __init__(self, length: int) -> None:
        self._length = length

    def get_seq_length(self, _layer: int = 0) -> int:
        return self._length


def _recomputes(model: Any, border: int) -> bool:
    """Whether the model lets go of its cache one token behind the border."""
    ids = torch.zeros(1, border + 1, dtype=torch.long)
    try:
        inputs = model.prepare_inputs_for_generation(
            ids,
            past_key_values=_FullCache(border),
            attention_mask=torch.ones_like(ids),
            next_sequence_length=1,
        )
    except Exception as error:  # any model code may fail in any way
        raise UnsupportedModelError(
            f"{type(model).__name__}: can't tell what its generate does at "
            f"original_max_position_embeddings ({type(error).__name__}: {error})"
        ) from error
    return inputs.get("past_key_values") is None
