"""Stages in threads: what they are given, what a trace is told, and the threads of who drives."""

from __future__ import annotations

import pickle

import pytest
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


@pytest.mark.parametrize("pipeline", ["inline", "threads"])
def test_a_micro_batch_could_cross_a_process(pipeline: str) -> None:
    """It is numbers alone: what it is pickled to and back is as good, prompts' logits included."""
    model, prompts = tiny_model("llama"), mixed_prompts()
    wanted = requests(prompts, max_tokens=4, logprobs=1, prompt_logprobs=1)
    engine = model.engine(devices=("cpu",) * STAGES, pipeline=pipeline, max_batch_tokens=64)
    expected = engine.generate(wanted)
    submit, sizes = engine.pipeline.submit, []

    def across(batch: ForwardBatch) -> None:
        crossed = pickle.dumps(batch)
        sizes.append(len(crossed))
        submit(pickle.loads(crossed))

    engine.reset_prefix_cache()
    engine.pipeline.submit = across  # type: ignore[method-assign]
    found = engine.generate(wanted)
    engine.close()
    assert sizes
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert [c.prompt_logprobs for c in found] == [c.prompt_logprobs for c in expected]
