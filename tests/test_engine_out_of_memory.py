"""A batch that memory doesn't hold: smaller batches, the same texts, and the worker lives."""

from __future__ import annotations

import logging

import pytest
import torch
from kits.engine_models import mixed_prompts, requests, tiny_model

from engine.batch import ForwardBatch
from engine.engine import Engine
from engine.scheduling.batch_budget import BATCHES_BEFORE_GROWTH, BatchBudget
from queue_api.wire.errors import EngineError, RequestOutOfMemoryError
from queue_api.wire.schemas import FinishReason

MODEL = tiny_model("llama")
PROMPTS = mixed_prompts()

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    MemoryError(),
]


def limit_memory(engine: Engine, num_tokens: int, error: Exception, place: int = -1) -> list[int]:
    """Let a stage fail, after it ran, with more tokens; the sizes of what failed are kept."""
    stage = engine.stages[place]
    run = stage.run
    failed: list[int] = []

    def limited(batch: ForwardBatch, inbound: torch.Tensor) -> torch.Tensor:
        out = run(batch, inbound)
        if batch.num_tokens > num_tokens:
            failed.append(batch.num_tokens)
            raise error
        return out

    stage.run = limited  # type: ignore[method-assign]
    return failed


def texts(engine: Engine) -> list[list[int]]:
    done = engine.generate(requests(PROMPTS, max_tokens=16))
    assert all(completion.error is None for completion in done)
    return [completion.token_ids for completion in done]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{error}"[:40])
def test_texts_are_the_same_when_memory_holds_few_tokens(error, caplog):
    engine = MODEL.engine(max_num_seqs=16)
    failed = limit_memory(engine, 5, error)
    with caplog.at_level(logging.WARNING):
        assert texts(engine) == [MODEL.greedy(prompt, 16) for prompt in PROMPTS]
    assert failed
    assert "out of memory with" in caplog.text
    engine.reset_prefix_cache()
    assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.num_slots


@pytest.mark.parametrize("config", [{"use_cache": False}, {"pipeline": "threads"}], ids=str)
def test_texts_are_the_same_in_every_way_to_run(config):
    if "pipeline" in config:
        config = {**config, "devices": ["cpu", "cpu"], "partition": "uniform"}
    engine = MODEL.engine(max_num_seqs=16, **config)
    failed = limit_memory(engine, 64, MemoryError(), place=0)
    assert texts(engine) == [MODEL.greedy(prompt, 16) for prompt in PROMPTS]
    assert failed
    engine.close()


def test_texts_are_the_same_where_sequences_run_one_by_one():
    engine = MODEL.engine(
        max_num_seqs=16, devices=["cpu", "cpu"], partition="uniform", prefix_caching=False
    )
    for stage in engine.stages:
        stage.pool = None
        stage.set_mode("single")
    failed = limit_memory(engine, 5, MemoryError(), place=0)
    assert texts(engine) == [MODEL.greedy(prompt, 16) for prompt in PROMPTS]
    assert failed


def test_a_text_that_does_not_fit_alone_ends_with_its_error():
    engine = MODEL.engine(max_num_seqs=16, use_cache=False)
    limit_memory(engine, 30, MemoryError())
    done = engine.generate(requests(PROMPTS, max_tokens=4))
    assert {len(prompt) + 3 > 30 for prompt in PROMPTS} == {True, False}
    for prompt, completion in zip(PROMPTS, done, strict=True):
        if len(prompt) + 3 > 30:
            assert completion.finish_reason is FinishReason.ERROR
            assert isinstance(completion.error, RequestOutOfMemoryError)
        else:
            assert completion.token_ids == MODEL.greedy(prompt, 4)


def test_another_device_error_still_ends_the_engine():
    engine = MODEL.engine(max_num_seqs=16)
    limit_memory(engine, 5, RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(EngineError, match="device-side assert"):
        texts(engine)


def test_the_budget_comes_back_slowly():
    budget = BatchBudget(64)
    budget.shrink(50, "full")
    sizes = [budget.tokens]
    while budget.tokens < 64:
        for _ in range(BATCHES_BEFORE_GROWTH):
            assert budget.tokens == sizes[-1]
            budget.went_well()
        sizes.append(budget.tokens)
    assert sizes[:3] == [25, 28, 31]
    assert sizes == sorted(set(sizes))
    budget.went_well()
    assert budget.tokens == 64
