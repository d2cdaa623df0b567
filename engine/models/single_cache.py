"""transformers' cache, cut to a stage's layers."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from engine.plan import StageSpec

__all__ = ["FarCache", "SingleCache"]


class SingleCache(DynamicCache):
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


class FarCache(SingleCache):
    """Says that it holds `num_seen` tokens, and gives back the new ones' keys and values alone."""

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - asked so
        return self.num_seen

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - asked so
        return self.num_seen

    def get_mask_sizes(self, query_length: int, _layer: int) -> tuple[int, int]:
        return query_length, self.num_seen

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        return key_states, value_states
