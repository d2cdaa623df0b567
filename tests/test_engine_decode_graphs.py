"""Decode steps in padded, captured batches give the same text; a capture that fails is left.

CUDA graphs need a GPU. What is around them is tested with a function that is simply run again on
the same tensors in place of each replay, as a graph would.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kits.engine_models import mixed_prompts, requests, tiny_model
from kits.varlen_reference import install

from engine.batch import ForwardBatch
from engine.engine import Engine
from engine.requests.sequence import Sequence
from engine.scheduling.round import Round
from engine.stages import decode_graphs
from engine.stages.decode_graphs import (
    MAX_ROWS,
    capture_for,
    decode_rows,
    is_decode_only,
    padded_size,
)
from queue_api.wire.schemas import SamplingParams

PROMPTS = mixed_prompts()
Function = Callable[[], torch.Tensor]


class Rerun:
    """As a graph's replay: the same function on the same tensors, the output in the same place."""

    num_captures = 0
    num_replays = 0

    def __init__(self, function: Function, device: torch.device) -> None:
        self._function = function
        self._output = function()
        type(self).num_captures += 1

    def __call__(self) -> torch.Tensor:
        type(self).num_replays += 1
        return self._output.copy_(self._function())


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> type[Rerun]:
    kind = type("Counted", (Rerun,), {})
    install(monkeypatch)
    monkeypatch.setattr("engine.stages.stage.capture_for", lambda device: kind)
    return kind


def token_ids(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(requests(prompts))]


def decodes(pasts: list[int], first_slots: list[int]) -> ForwardBatch:
    work = []
    for i, (past, first) in enumerate(zip(pasts, first_slots, strict=True)):
        tokens = list(range(10 * i, 10 * i + past + 1))
        sampling = SamplingParams(max_tokens=1)
        sequence = Sequence.create(
            str(i), i, tokens, [], sampling, seed=0, added_at=0.0, num_stages=1
        )
        sequence.num_cached, sequence.first_slot = past, first
        work.append((sequence, 1))
    return Round.pack(work).batch


@given(st.integers(1, MAX_ROWS))
def test_a_batch_runs_in_the_smallest_size_that_holds_it(num_rows: int) -> None:
    sizes = {padded_size(n) for n in range(1, MAX_ROWS + 1)}
    assert padded_size(num_rows) == min(size for size in sizes if size >= num_rows)


def test_sizes_are_few_and_have_an_end() -> None:
    sizes = sorted({padded_size(n) for n in range(1, MAX_ROWS + 1)})
    assert sizes[:7] == [1, 2, 4, 8, 16, 32, 64]
    assert len(sizes) <= 24
    assert padded_size(MAX_ROWS + 1) is None


def test_rows_of_a_graph_say_what_the_batch_says_and_padding_has_its_own_slot() -> None:
    batch = decodes([4, 0, 7], [20, 3, 40])
    assert is_decode_only(batch)
    rows = decode_rows(batch, 4, scratch_slot=99)
    token_ids, positions, slots, firsts, counts = rows.tolist()
    assert token_ids == [4, 10, 27, 0]
    assert positions == [4, 0, 7, 0]
    assert slots == [24, 3, 47, 99]
    assert firsts == [20, 3, 40, 99]
    assert counts == [5, 1, 8, 1]


def test_prompts_and_their_last_chunks_are_not_decodes() -> None:
    sampling = SamplingParams(max_tokens=1)
    sequence = Sequence.create("k", 0, [1, 2, 3], [], sampling, seed=0, added_at=0.0, num_stages=1)
    sequence.first_slot = 0
    assert not is_decode_only(Round.pack([(sequence, 3)]).batch)
    assert not is_decode_only(Round.pack([(sequence, 1)]).batch)  # a chunk, no token is due
    scoring = SamplingParams(max_tokens=1, prompt_logprobs=0)
    sequence = Sequence.create("k", 0, [1, 2], [], scoring, seed=0, added_at=0.0, num_stages=1)
    sequence.first_slot = 0
    sequence.num_cached = 1
    scoring_round = Round.pack([(sequence, 1)])
    assert is_decode_only(scoring_round.batch) == (not scoring_round.scored)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_replayed_decodes_match_generate(name: str, rerun: type[Rerun]) -> None:
    model = tiny_model(name)
    engine = model.engine(max_num_seqs=16)
    assert token_ids(engine, PROMPTS) == [model.greedy(prompt) for prompt in PROMPTS]
    assert token_ids(engine, PROMPTS[:3]) == [model.greedy(prompt) for prompt in PROMPTS[:3]]
    sizes = engine.stages[0]._graphs.sizes
    assert sizes
    assert rerun.num_captures == len(sizes)  # each once
    assert rerun.num_replays > 2 * len(sizes)


def test_padding_leaves_the_texts_caches_alone(rerun: type[Rerun]) -> None:
    engine = tiny_model("llama").engine(kv_cache_tokens=40)
    (stage,) = engine.stages
    assert stage.pool.num_slots == 41  # the padding's is no sequence's
    for tensor in (*stage.pool.keys, *stage.pool.values):
        tensor.fill_(7.0)
    batch = decodes([0, 0, 0], [5, 11, 30])
    stage.run(batch, batch.token_ids[None])
    stage.run(batch, batch.token_ids[None])
    assert stage._graphs.sizes == [4]
    for tensor in (*stage.pool.keys, *stage.pool.values):
        changed = tensor.ne(7.0).any(dim=2).any(dim=0).nonzero()[:, 0].tolist()
        assert changed == [5, 11, 30, 40]


def test_only_a_whole_model_on_one_stage_is_captured(
    rerun: type[Rerun], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    engine = model.engine(devices=("cpu", "cpu"))
    assert token_ids(engine, PROMPTS[:3]) == [model.greedy(prompt) for prompt in PROMPTS[:3]]
    assert rerun.num_captures == 0
    monkeypatch.undo()
    engine = model.engine()  # a CPU has no graphs
    assert engine.stages[0]._graphs is None
    assert capture_for(torch.device("cpu")) is None


def _fails(function: Function, device: torch.device) -> Function:
    raise RuntimeError("operation not permitted when stream is capturing")


def _frozen(function: Function, device: torch.device) -> Function:
    """As if all numbers had been read when it was captured."""
    output = function().clone()
    return lambda: output


@pytest.mark.parametrize(
    ("capture", "reason"), [(_fails, "not permitted"), (_frozen, "replay is off")]
)
def test_a_graph_that_fails_or_differs_is_left_with_one_warning(
    capture: Callable,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(monkeypatch)
    monkeypatch.setattr("engine.stages.stage.capture_for", lambda device: capture)
    model = tiny_model("llama")
    engine = model.engine()
    with caplog.at_level(logging.WARNING, decode_graphs.__name__):
        assert token_ids(engine, PROMPTS[:5]) == [model.greedy(prompt) for prompt in PROMPTS[:5]]
    (message,) = caplog.messages
    assert "run without CUDA graphs" in message
    assert reason in message


def test_layers_that_attend_sequence_by_sequence_are_not_captured(
    rerun: type[Rerun], caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma 2's soft-capping is none of the kernel's features."""
    model = tiny_model("gemma2")
    engine = model.engine()
    with caplog.at_level(logging.WARNING, decode_graphs.__name__):
        assert token_ids(engine, PROMPTS[:5]) == [model.greedy(prompt) for prompt in PROMPTS[:5]]
    (message,) = caplog.messages
    assert "sequence by sequence" in message
