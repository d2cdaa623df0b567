"""The short input on which a stage is compared with its own model when it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.batch import ForwardBatch, Segment

__all__ = ["CHECKED_ROWS", "PROBE_LENGTH", "PROBE_SLOTS", "ProbeStep", "probe_steps", "whole_probe"]

PROBE_LENGTH = 11
PROBE_SLOTS = 32
_CUT = 5
CHECKED_ROWS = [_CUT - 1, PROBE_LENGTH - 1]
"""Positions whose output is compared: the last of each chunk."""


@dataclass(frozen=True)
class ProbeStep:
    """A batch of the probed sequence and a neighbour."""

    batch: ForwardBatch
    source: torch.Tensor  # [T], the probe's position that each packed token is taken from


def probe_steps(*, use_cache: bool) -> list[ProbeStep]:
    """Two steps of the probed sequence: a chunk, then the rest behind a neighbour's decode."""
    neighbour = [PROBE_LENGTH - 1 - i for i in range(4)]  # other tokens, so leaks show
    past = _CUT if use_cache else 0
    neighbour_past = 3 if use_cache else 0
    first = _step([(0, list(range(_CUT)), 0), (1, neighbour[:3], 0)], use_cache, checked=0)
    second = _step(
        [
            (1, neighbour[neighbour_past:], neighbour_past),
            (0, list(range(past, PROBE_LENGTH)), past),
        ],
        use_cache,
        checked=1,
    )
    return [first, second]


def whole_probe() -> ForwardBatch:
    """The probed sequence alone, in one go and without a cache."""
    return _step([(0, list(range(PROBE_LENGTH)), 0)], False, checked=0).batch


def _step(parts: list[tuple[int, list[int], int]], use_cache: bool, *, checked: int) -> ProbeStep:
    """Pack (sequence number, source positions, past); the logits of part `checked` are due."""
    segments: list[Segment] = []
    source: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    start = 0
    for number, taken, past in parts:
        first_slot = number * (PROBE_SLOTS // 2)
        segments.append(Segment(start, len(taken), past, first_slot, number))
        source += taken
        positions += range(past, past + len(taken))
        slots += range(first_slot + past, first_slot + past + len(taken))
        start += len(taken)
    due = segments[checked]
    batch = ForwardBatch(
        segments=segments,
        token_ids=torch.empty(0, dtype=torch.long),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots) if use_cache else None,
        logit_rows=torch.tensor([due.start + due.count - 1]),
        sequences=[],
        due=[],
    )
    return ProbeStep(batch, torch.tensor(source))
