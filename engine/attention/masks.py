"""The mask function that transformers models call here: what a mask is, in place of its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["MaskRule", "describe_mask"]


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Which keys a query may see: none after itself and, if set, only a window or its chunk."""

    window: int = 0
    """The query's own token and the `window - 1` before it; 0 is no limit."""
    chunk: int = 0
    """Only tokens of the same chunk of so many positions; 0 is no limit."""
    unknown: str = ""
    """What makes the mask one that can't be described; refused by the layer that would use it, as
    models also make masks that none of their layers uses."""

    ndim = 4  # Some models look whether the mask they were given is a prepared one.

    def first_key(self, position: int) -> int:
        """The first position that the query at `position` may see."""
        if self.chunk:
            return position - position % self.chunk
        return max(0, position + 1 - self.window) if self.window else 0

    def mask(self, past: int, count: int, first_key: int) -> torch.Tensor:
        """True where the queries `past .. past+count` may look, from key `first_key` on."""
        query = torch.arange(past, past + count)[:, None]
        key = torch.arange(first_key, past + count)[None, :]
        allowed = key <= query  # [count, L]
        if self.window:
            allowed &= key > query - self.window
        if self.chunk:
            allowed &= key // self.chunk == query // self.chunk
        return allowed


def _mask_parts(function: Callable[..., Any]) -> set[str]:
    """Names of the functions that transformers' masking_utils composed into `function`."""
    names: set[str] = set()
    todo: list[Callable[..., Any]] = [function]
    while todo:
        current = todo.pop()
        names.add(current.__qualname__.split(".")[0])
        for cell in getattr(current, "__closure__", None) or ():
            content = cell.cell_contents
            parts = content if isinstance(content, tuple) else (content,)
            todo += [part for part in parts if callable(part)]
    return names


def describe_mask(
    *,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> MaskRule:
    """The mask function: say what the mask is instead of drawing it.

    Known are masks made of causal, sliding and chunked parts.
    """
    overlays = _mask_parts(mask_function) - {"and_masks", "causal_mask_function"}
    if not use_vmap and not overlays:
        return MaskRule()
    if not use_vmap and local_size:
        if overlays == {"sliding_window_overlay"}:
            return MaskRule(window=local_size)
        if overlays == {"chunked_overlay"}:
            return MaskRule(chunk=local_size)
    return MaskRule(unknown=", ".join(sorted(overlays)) or "custom parts")
