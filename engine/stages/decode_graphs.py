"""Decode steps replayed as CUDA graphs, for they are bound by launches otherwise.

A graph is captured for one number of rows; a batch runs in the smallest that holds it, with
padding rows that read and write a slot of their own, which no sequence has. Everything that differs
from step to step is in one tensor on the device.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch

from engine.attention.varlen import VarlenLayout
from engine.batch import ForwardBatch
from engine.transfer import moved

__all__ = ["CaptureFunction", "CapturedGraph", "DecodeGraphs", "capture_for", "decode_rows"]

logger = logging.getLogger(__name__)

SMALL_SIZES = (1, 2, 4, 8, 16)
STEP = 32
MAX_ROWS = 512
"""Batches of more rows keep a device busy without a graph."""


class Replay(Protocol):
    """A captured function of static tensors."""

    def __call__(self) -> torch.Tensor: ...


Function = Callable[[], torch.Tensor]
CaptureFunction = Callable[[Function, torch.device], Replay]
Forward = Callable[[ForwardBatch], torch.Tensor]


def padded_size(num_rows: int) -> int | None:
    """Rows of the graph that a batch of `num_rows` runs in; None if it is too large for any."""
    if num_rows > MAX_ROWS:
        return None
    for size in SMALL_SIZES:
        if num_rows <= size:
            return size
    return -(-num_rows // STEP) * STEP


def is_decode_only(batch: ForwardBatch) -> bool:
    """Whether each sequence has one token, and each gets one."""
    return batch.num_due == len(batch.segments) == batch.num_tokens == len(batch.logit_rows)


def decode_rows(batch: ForwardBatch, size: int, scratch_slot: int) -> torch.Tensor:
    """A graph's input for a batch of decodes, padded to `size` rows.

    :returns: [5, size] int64: token ids, positions, slots to write, first slots, cached tokens
        with the new one
    """
    assert batch.slots is not None
    rows = torch.zeros(5, size, dtype=torch.int64)
    rows[2:4] = scratch_slot
    rows[4] = 1
    if count := batch.num_tokens:
        torch.stack(
            [
                batch.token_ids,
                batch.positions,
                batch.slots,
                batch.slots - batch.positions,
                batch.positions + 1,
            ],
            out=rows[:, :count],
        )
    return rows


class DecodeGraphs:
    """The graphs of one stage that is the whole model.

    Each is compared with the eager forward on the first batch that wants it; one that differs, or
    that can't be captured, ends the use of graphs, with a warning.
    """

    def __init__(
        self,
        forward: Forward,
        capture: CaptureFunction,
        *,
        device: torch.device,
        scratch_slot: int,
        tolerance: float,
    ) -> None:
        self._forward = forward
        self._capture = capture
        self._device = device
        self._scratch_slot = scratch_slot
        self._tolerance = tolerance
        self._graphs: dict[int, _PaddedDecode] = {}
        self._is_usable = True

    @property
    def sizes(self) -> list[int]:
        """Rows of the graphs there are."""
        return sorted(self._graphs)

    def run(self, batch: ForwardBatch) -> torch.Tensor | None:
        """The batch's logits [B, V], valid until the next run; None if it has to run eagerly."""
        if not (self._is_usable and is_decode_only(batch)):
            return None
        size = padded_size(batch.num_tokens)
        if size is None:
            return None
        graph = self._graphs.get(size)
        return self._run_first(batch, size) if graph is None else graph.run(batch)

    def _run_first(self, batch: ForwardBatch, size: int) -> torch.Tensor | None:
        """Capture a graph, and run the batch both ways."""
        try:
            graph = _PaddedDecode(
                self._forward, self._capture, size, self._device, self._scratch_slot
            )
            replayed = graph.run(batch).clone()
        except Exception as problem:  # any model code may fail in any way
            self._give_up(f"{type(problem).__name__}: {problem}")
            return None
        eager = self._forward(batch)
        difference = (replayed.float() - eager.float()).norm(dim=-1)
        error = float((difference / eager.float().norm(dim=-1).clamp(min=1e-6)).max())
        if error <= self._tolerance:
            self._graphs[size] = graph
            logger.debug("decode graph of %d rows, error %.1e", size, error)
        else:
            self._give_up(f"its replay is off by {error:.1e}")
        return eager

    def _give_up(self, reason: str) -> None:
        self._is_usable = False
        self._graphs.clear()
        logger.warning("decode steps run without CUDA graphs: %s", reason)


class _PaddedDecode:
    """One graph and its static tensors."""

    def __init__(
        self,
        forward: Forward,
        capture: CaptureFunction,
        size: int,
        device: torch.device,
        scratch_slot: int,
    ) -> None:
        self._size = size
        self._scratch_slot = scratch_slot
        # Captured with padding alone: a number that capturing would freeze is wrong for the batch
        # that the replay is then compared on.
        nothing = torch.empty(0, dtype=torch.int64)
        padding = decode_rows(
            ForwardBatch([], nothing, nothing, nothing, nothing), size, scratch_slot
        )
        self._rows = padding.to(device)
        key_starts = torch.zeros(size + 1, dtype=torch.int32, device=device)
        key_counts = torch.ones(size, dtype=torch.int32, device=device)
        queries = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._batch = ForwardBatch(
            segments=[],
            token_ids=self._rows[0],
            positions=self._rows[1],
            slots=self._rows[2],
            logit_rows=torch.arange(size, device=device),
        )
        # The longest is the pool's length: the kernel reads no further than the counts say.
        layout = VarlenLayout(queries, key_starts, key_counts, 1, scratch_slot)
        self._batch.layouts[VarlenLayout, self._rows.device] = layout

        def step() -> torch.Tensor:
            key_starts[:size].copy_(self._rows[3])
            key_counts.copy_(self._rows[4])
            return forward(self._batch)

        self._replay = capture(step, self._rows.device)

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        rows = decode_rows(batch, self._size, self._scratch_slot)
        self._rows.copy_(moved(rows, self._rows.device))
        return self._replay()[: batch.num_tokens]


class CapturedGraph:
    """A CUDA graph of a function that reads and writes static tensors.

    :param pool: memory that graphs share; then the output is valid until another of them runs
    """

    def __init__(self, function: Function, device: torch.device, *, pool: Any = None) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(2):  # what libraries set up when first used can't be captured
                    function()
            torch.cuda.current_stream(device).wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device.
            with torch.cuda.graph(
                self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                self._output = function()

    def __call__(self) -> torch.Tensor:
        """Run it; the output's tensor is the same each time."""
        self._graph.replay()
        return self._output


def capture_for(device: torch.device) -> CaptureFunction | None:
    """How functions are captured on a device; None where they can't be."""
    if device.type != "cuda":
        return None
    return functools.partial(CapturedGraph, pool=torch.cuda.graph_pool_handle())
