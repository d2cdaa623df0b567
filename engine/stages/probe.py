"""The short input on which a stage is compared with its own model when it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.batch import ForwardBatch, Segment

__all__ = ["CHECKED_ROWS", "PROBE_LENGTH", "PROBE_SLOTS", "ProbeStep", "probe_steps", "whole_probe"]

_ENDS = (6, 7, 15, 16)
"""Where the probe's chunks end: a prompt, a decode, a chunk behind a past, a decode."""
PROBE_LENGTH = _ENDS[-1]
PROBE_SLOTS = 2 * PROBE_LENGTH
CHECKED_ROWS = [end - 1 for end in _ENDS]
"""Positions whose output is compared: the last of each chunk."""


@dataclass(frozen=True)
class ProbeStep:
    """A batch of the probed sequence and a neighbour."""

    batch: ForwardBatch
    source: torch.Tensor  # [T], the probe's position that each packed token is taken from


def probe_steps(*, use_cache: bool, is_long: bool) -> list[ProbeStep]:
    """The probed sequence chunk by chunk, next to a neighbour that reads, then decodes.

    :param is_long: it is longer than the text that LongRoPE's short factors are for
    """
    steps = []
    for i, end in enumerate(_ENDS):
        past = _ENDS[i - 1] if i and use_cache else 0
        seen = 2 + i if i and use_cache else 0
        # The probe's own tokens backwards, so that leaks show.
        neighbour = [PROBE_LENGTH - 1 - j for j in range(3 + i)]
        parts = [(1, neighbour[seen:], seen), (0, list(range(past, end)), past)]
        checked = 1
        if i % 2 == 0:  # in either order
            parts.reverse()
            checked = 0
        steps.append(_step(parts, use_cache, is_long, checked=checked))
    return steps


def whole_probe(*, is_long: bool) -> ForwardBatch:
    """The probed sequence alone, in one go and without a cache."""
    return _step([(0, list(range(PROBE_LENGTH)), 0)], False, is_long, checked=0).batch


def _step(
    parts: list[tuple[int, list[int], int]], use_cache: bool, is_long: bool, *, checked: int
) -> ProbeStep:
    """Pack (sequence number, source positions, past); the logits of part `checked` are due."""
    segments: list[Segment] = []
    source: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    start = 0
    for number, taken, past in parts:
        first_slot = number * (PROBE_SLOTS // 2)
        segments.append(Segment(start, len(taken), past, first_slot, number, is_long))
        source += taken
        positions += range(past, past + len(taken))
        slots += range(first_slot + past, first_slot + past + len(taken))
        start += len(taken)
    due = segments[checked]
    batch = ForwardBatch(
        segments=segments,
        token_ids=torch.tensor(source),  # not read, but counted
        positions=torch.tensor(positions),
        slots=torch.tensor(slots) if use_cache else None,
        logit_rows=torch.tensor([due.start + due.count - 1]),
    )
    return ProbeStep(batch, torch.tensor(source))
