"""How micro-batches go through the stages: one after the other, or each stage in a thread.

::

    inline    [stage 0][stage 1]           one micro-batch, all threads in every stage
    threads   stage 0  a0 b0 a1 b1 ...     as many micro-batches as stages, so none waits
              stage 1     a0 b0 a1 ...
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from engine.batch import BatchOutOfMemoryError, ForwardBatch
from engine.stages.stage import Stage
from queue_api.wire.errors import EngineError

__all__ = ["InlinePipeline", "Pipeline", "StageTrace", "ThreadedPipeline"]

CPU_ALLOCATOR_WORDS = ("not enough memory", "can't allocate memory")
"""What torch's allocator says on a CPU, in a plain RuntimeError."""

StageTrace = Callable[[int, ForwardBatch, float, float], None]
"""Told a stage's index, its micro-batch, and begin and end in seconds of `time.perf_counter`; in
the stage's own thread, and with a micro-batch that failed, too."""


class Pipeline(Protocol):
    """Takes micro-batches in and gives them back, in order, with their logits."""

    capacity: int
    """Micro-batches that may be in flight."""
    trace: StageTrace | None
    """Called after each run of a stage, if set; `benchmarks/pipeline_timeline.py` draws from it."""

    @property
    def num_in_flight(self) -> int: ...

    def submit(self, batch: ForwardBatch) -> None: ...

    def collect(self) -> tuple[ForwardBatch, torch.Tensor]:
        """Wait for the oldest micro-batch; its logits are [B, V].

        :raises BatchOutOfMemoryError: if a stage had no memory for it; others may follow
        :raises EngineError: if a stage failed
        """
        ...

    def release(self, number: int) -> None:
        """Free what the stages keep for a sequence that has no micro-batch in flight."""
        ...

    def close(self) -> None:
        """Stop what runs, and let go of the stages."""
        ...


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once may help; any other error of a device may not be survived."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in CPU_ALLOCATOR_WORDS)


def _run_stage(
    stage: Stage, batch: ForwardBatch, inbound: torch.Tensor, trace: StageTrace | None
) -> torch.Tensor:
    started = time.perf_counter()
    try:
        return stage.run(batch, inbound)
    except Exception as error:
        problem = (
            f"stage {stage.spec.index} on {stage.device} failed: {type(error).__name__}: {error}"
        )
        if not _is_out_of_memory(error):
            raise EngineError(problem) from error
    finally:
        ended = time.perf_counter()
        batch.stage_s.append(ended - started)
        if trace is not None:
            trace(stage.spec.index, batch, started, ended)
    # raised out here, for the error's traceback would keep the batch's tensors in memory
    raise BatchOutOfMemoryError(problem, batch)


class InlinePipeline:
    """Runs all stages in the caller's thread."""

    capacity = 1

    def __init__(self, stages: Sequence[Stage], num_threads: int | None) -> None:
        self.trace: StageTrace | None = None
        self._stages = stages
        self._submitted: deque[ForwardBatch] = deque()
        if num_threads is not None and num_threads != torch.get_num_threads():
            torch.set_num_threads(num_threads)

    @property
    def num_in_flight(self) -> int:
        return len(self._submitted)

    def submit(self, batch: ForwardBatch) -> None:
        self._submitted.append(batch)

    def collect(self) -> tuple[ForwardBatch, torch.Tensor]:
        batch = self._submitted.popleft()
        passed = batch.token_ids[None]
        for stage in self._stages:
            passed = _run_stage(stage, batch, passed, self.trace)
        return batch, passed

    def release(self, number: int) -> None:
        for stage in self._stages:
            stage.release(number)

    def close(self) -> None:
        self._submitted.clear()
        self._stages = ()


_Passed = tuple[ForwardBatch, torch.Tensor | BaseException]


class ThreadedPipeline:
    """Gives each stage a thread; a micro-batch goes from queue to queue.

    Each stage gets its share of the CPU threads, and so, until `close`, does who makes this.
    """

    def __init__(self, stages: Sequence[Stage], num_threads: int | None) -> None:
        self.capacity = len(stages)
        self.num_in_flight = 0
        self.trace: StageTrace | None = None
        self._stages = stages
        self._queues: list[queue.SimpleQueue[_Passed | None]] = [
            queue.SimpleQueue() for _ in range(len(stages) + 1)
        ]
        total = torch.get_num_threads() if num_threads is None else num_threads
        # torch's thread count belongs to the thread that sets it.
        per_stage = max(1, total // len(stages))
        # The caller samples while the stages compute. With more threads than its share it waits for
        # cores that the stages have, and the first stage for it.
        self._callers_threads = torch.get_num_threads()
        torch.set_num_threads(per_stage)
        self._threads = [
            threading.Thread(
                target=self._serve, args=(i, per_stage), name=f"stage-{i}", daemon=True
            )
            for i in range(len(stages))
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self, index: int, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        inbox, outbox = self._queues[index : index + 2]
        while (item := inbox.get()) is not None:
            batch, passed = item
            if not isinstance(passed, BaseException):
                try:
                    passed = _run_stage(self._stages[index], batch, passed, self.trace)
                except EngineError as error:
                    passed = error
            outbox.put((batch, passed))
        outbox.put(None)

    def submit(self, batch: ForwardBatch) -> None:
        self.num_in_flight += 1
        self._queues[0].put((batch, batch.token_ids[None]))

    def collect(self) -> tuple[ForwardBatch, torch.Tensor]:
        item = self._queues[-1].get()
        self.num_in_flight -= 1
        assert item is not None  # only `close` sends it, and nothing is collected after that
        batch, passed = item
        if isinstance(passed, BaseException):
            raise passed
        return batch, passed

    def release(self, number: int) -> None:
        for stage in self._stages:
            stage.release(number)

    def close(self) -> None:
        self._queues[0].put(None)
        for thread in self._threads:
            thread.join()
        torch.set_num_threads(self._callers_threads)
        self._stages = ()
