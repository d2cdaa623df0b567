"""Stages in threads: what a trace is told, and the threads of who drives them."""

from __future__ import annotations

import torch
from kits.engine_models import mixed_prompts, requests, tiny_model

from engine.batch import ForwardBatch

STAGES = 3


def test_a_trace_sees_every_stage_of_every_micro_batch_in_order() -> None:
    engine = tiny_model("llama").engine(devices=("cpu",) * STAGES, pipeline="threads")
    runs: dict[int, list[tuple[int, float, float]]] = {}
    batches: list[ForwardBatch] = []

    def trace(stage: int, batch: ForwardBatch, began: float, ended: float) -> None:
        batches.append(batch)  # kept, or another could get the same id
        runs.setdefault(id(batch), []).append((stage, began, ended))

    engine.pipeline.trace = trace
    engine.generate(requests(mixed_prompts(), max_tokens=4))
    engine.close()
    assert len(runs) >= 4
    for seen in runs.values():
        assert [stage for stage, _, _ in seen] == list(range(STAGES))
        times = [time for _, began, ended in seen for time in (began, ended)]
        assert times == sorted(times)


def test_who_drives_a_threaded_pipeline_has_a_stage_s_share_of_threads_until_it_closes() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(STAGES)
    try:
        engine = tiny_model("llama").engine(devices=("cpu",) * STAGES, pipeline="threads")
        assert torch.get_num_threads() == 1
        engine.close()
        assert torch.get_num_threads() == STAGES
    finally:
        torch.set_num_threads(before)
