"""ForwardBatch: the packed tokens of one micro-batch, shared by all stages.

Numbers only: whose they are stays with the scheduler (`scheduling/round.py`), so that a
micro-batch could cross a process or a host.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field, replace

import torch

from engine.transfer import moved
from queue_api.wire.errors import EngineError

__all__ = ["BatchOutOfMemoryError", "CacheCopy", "ForwardBatch", "Segment"]


@dataclass(frozen=True, slots=True)
class CacheCopy:
    """Slots `source ..` to be copied to `destination ..`; the two don't overlap.

    Those of a micro-batch are made in its order: one may write where an earlier one has read.
    """

    source: int
    destination: int
    length: int
    is_move: bool = False
    """The source was the sequence's own range, given up for the new one."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's tokens in a packed batch.

    ::

        packed tokens   ... | start .. start+count | ...
        sequence        0 .. past | past .. past+count       (positions)
        KV slots        first_slot .. | first_slot+past ..   (the same range in every stage)
    """

    start: int
    count: int
    past: int
    first_slot: int
    number: int
    """The sequence's number; keys the caches of a stage that can't pack."""
    is_long: bool = False
    """Rotated by LongRoPE's long factors from the sequence's first token on."""


@dataclass(slots=True)
class ForwardBatch:
    """Tokens of several sequences, one after the other, without padding."""

    segments: list[Segment]
    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor | None  # [T] int64, where K and V go; None: without a cache
    logit_rows: torch.Tensor
    """[B + N] int64, the packed tokens whose logits are due: next tokens', then prompts'."""
    num_due: int = 0
    """B: how many of `logit_rows` are for a next token; the others score prompts."""
    copies: list[CacheCopy] = field(default_factory=list)
    """What each stage copies within its pool before it runs the batch."""
    stage_s: list[float] = field(default_factory=list)
    """Time in each stage so far; filled by the pipeline."""
    _on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = field(
        default_factory=dict
    )
    layouts: dict[object, object] = field(default_factory=dict)
    """How attention goes over the batch, by mask rule and device; filled by the backend, used by
    all layers."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """`positions`, `slots` and `logit_rows` on a device, moved once per batch."""
        if device == self.positions.device:
            return self.positions, self.slots, self.logit_rows
        if device not in self._on_device:
            self._on_device[device] = (
                moved(self.positions, device),
                None if self.slots is None else moved(self.slots, device),
                moved(self.logit_rows, device),
            )
        return self._on_device[device]

    def of_tokens(self, tokens: torch.Tensor) -> ForwardBatch:
        """Some of the packed tokens, [n] int64, ascending: those in a row stay one segment.

        They see what they saw in the whole batch, so of a batch with slots alone.
        """
        assert self.slots is not None
        starts = [segment.start for segment in self.segments]
        begins, chosen = set(starts), tokens.tolist()
        firsts = [i for i, t in enumerate(chosen) if not i or t != chosen[i - 1] + 1 or t in begins]
        segments: list[Segment] = []
        for first, end in zip(firsts, [*firsts[1:], len(chosen)], strict=True):
            whole = self.segments[bisect.bisect_right(starts, chosen[first]) - 1]
            past = whole.past + chosen[first] - whole.start
            segments.append(replace(whole, start=first, count=end - first, past=past))
        return ForwardBatch(
            segments=segments,
            token_ids=self.token_ids[tokens],
            positions=self.positions[tokens],
            slots=self.slots[tokens],
            logit_rows=torch.arange(len(tokens)),
        )


class BatchOutOfMemoryError(EngineError):
    """A stage had no memory for a micro-batch; stages and sequences are as usable as before it."""

    def __init__(self, message: str, batch: ForwardBatch) -> None:
        super().__init__(message)
        self.batch = batch
