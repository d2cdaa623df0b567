"""ForwardBatch: the packed tokens of one micro-batch, shared by all stages."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.kv_cache import CacheCopy
from engine.sequence import Sequence
from engine.transfer import moved

__all__ = ["ForwardBatch", "Segment"]


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


@dataclass(slots=True)
class ForwardBatch:
    """Tokens of several sequences, one after the other, without padding."""

    segments: list[Segment]
    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor | None  # [T] int64, where K and V go; None: without a cache
    logit_rows: torch.Tensor
    """[B + N] int64, the packed tokens whose logits are due: those of `due`, then of `scored`."""
    sequences: list[Sequence]
    """All sequences in the batch, in the order of `segments`."""
    due: list[Sequence]
    """Those that get a new token, in the order of `logit_rows`."""
    scored: list[tuple[Sequence, range]] = field(default_factory=list)
    """Those that want logits of their prompt, and the places in it whose logits come."""
    copies: list[CacheCopy] = field(default_factory=list)
    """What each stage copies within its pool before it runs the batch."""
    stage_s: list[float] = field(default_factory=list)
    """Time in each stage so far; filled by the pipeline."""
    _on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = field(
        default_factory=dict
    )
    plans: dict[object, object] = field(default_factory=dict)
    """Attention plans by mask rule and device; filled by the backend, used by all layers."""

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
            segments.append(Segment(first, end - first, past, whole.first_slot, whole.number))
        return ForwardBatch(
            segments=segments,
            token_ids=self.token_ids[tokens],
            positions=self.positions[tokens],
            slots=self.slots[tokens],
            logit_rows=torch.arange(len(tokens)),
            sequences=[],
            due=[],
        )

    @classmethod
    def pack(cls, work: Iterable[tuple[Sequence, int]], *, use_cache: bool = True) -> ForwardBatch:
        """Pack the next `count` pending tokens of each sequence.

        Without a cache a sequence's whole text is packed, whatever `count` says.
        """
        segments, sequences, due, rows, ids, positions, slots = [], [], [], [], [], [], []
        scored: list[tuple[Sequence, range]] = []
        scored_rows: list[int] = []
        start = 0
        for sequence, pending in work:
            past = sequence.num_cached if use_cache else 0
            count = pending if use_cache else sequence.num_tokens
            end = past + count
            segments.append(Segment(start, count, past, sequence.first_slot, sequence.number))
            sequences.append(sequence)
            ids.append(sequence.token_ids[past:end])
            positions.append(np.arange(past, end))
            slots.append(np.arange(sequence.first_slot + past, sequence.first_slot + end))
            if sequence.prompt_logprobs is not None:
                known = len(sequence.prompt_logprobs)
                places = range(max(past, known), min(end, sequence.num_prompt - 1))
                if places:
                    scored.append((sequence, places))
                    scored_rows += [start + place - past for place in places]
            start += count
            if end == sequence.num_tokens:
                due.append(sequence)
                rows.append(start - 1)
        return cls(
            segments=segments,
            token_ids=torch.from_numpy(np.concatenate(ids)),
            positions=torch.from_numpy(np.concatenate(positions)),
            slots=torch.from_numpy(np.concatenate(slots)) if use_cache else None,
            logit_rows=torch.tensor(rows + scored_rows, dtype=torch.long),
            sequences=sequences,
            due=due,
            scored=scored,
            copies=[s.copy for s in sequences if s.copy is not None],
        )
