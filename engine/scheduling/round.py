"""Round: one micro-batch, and whose its numbers are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import ForwardBatch, Segment
from engine.requests.sequence import Sequence

__all__ = ["Round"]


@dataclass(frozen=True, slots=True)
class Round:
    """A micro-batch as the scheduler knows it; the stages get `batch` alone."""

    batch: ForwardBatch
    sequences: list[Sequence]
    """All sequences in the batch, in the order of `batch.segments`."""
    due: list[Sequence]
    """Those that get a new token, in the order of the first `batch.num_due` logits."""
    scored: list[tuple[Sequence, range]]
    """Those that want logits of their prompt, and the places in it whose logits come behind."""

    @classmethod
    def pack(cls, work: Iterable[tuple[Sequence, int]], *, use_cache: bool = True) -> Round:
        """Pack the next `count` pending tokens of each sequence.

        Without a cache all tokens of a sequence are packed, whatever `count` says.
        """
        segments, sequences, due, rows, ids, positions, slots = [], [], [], [], [], [], []
        scored: list[tuple[Sequence, range]] = []
        scored_rows: list[int] = []
        start = 0
        for sequence, pending in work:
            past = sequence.num_cached if use_cache else 0
            count = pending if use_cache else sequence.num_tokens
            end = past + count
            segments.append(
                Segment(
                    *(start, count, past, sequence.first_slot, sequence.number), sequence.is_long
                )
            )
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
        batch = ForwardBatch(
            segments=segments,
            token_ids=torch.from_numpy(np.concatenate(ids)),
            positions=torch.from_numpy(np.concatenate(positions)),
            slots=torch.from_numpy(np.concatenate(slots)) if use_cache else None,
            logit_rows=torch.tensor(rows + scored_rows, dtype=torch.long),
            num_due=len(due),
            copies=[s.copy for s in sequences if s.copy is not None],
        )
        return cls(batch, sequences, due, scored)
