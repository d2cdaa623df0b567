"""Several samples of a request: each its own text, all of them one completion."""

from __future__ import annotations

import pytest
from kits.engine_models import mixed_prompts, requests, tiny_model

from engine.engine import Engine
from engine.requests.completion import Completion
from engine.requests.stop_strings import StopSearch
from queue_api.wire.errors import DuplicateRequestError, InvalidRequestError
from queue_api.wire.schemas import FinishReason, GenerationRequest, SamplingParams

MODEL = tiny_model("llama")
PROMPTS = mixed_prompts(4)
SAMPLING = {"temperature": 0.9, "max_tokens": 10, "ignore_eos": True}


def samples(completion: Completion) -> list[list[int]]:
    return [sample.token_ids for sample in completion.samples]


def finished(engine: Engine) -> list[Completion]:
    done: list[Completion] = []
    while engine.has_unfinished():
        done += engine.step()
    return done


@pytest.mark.parametrize("seed", [None, 7])
def test_samples_differ_and_the_first_is_that_of_one(seed: int | None) -> None:
    engine = MODEL.engine()
    alone = engine.generate(requests(PROMPTS, seed=seed, **SAMPLING))
    several = engine.generate(requests(PROMPTS, seed=seed, n=5, **SAMPLING))
    for one, many in zip(alone, several, strict=True):
        assert not one.samples
        assert samples(many)[0] == many.token_ids == one.token_ids
        assert len({tuple(sample) for sample in samples(many)}) == 5
        assert many.completion_tokens == 50
        assert many.prompt_tokens == one.prompt_tokens


def test_fewer_samples_are_the_first_of_more_in_any_batch_and_partition() -> None:
    expected = MODEL.engine().generate(requests(PROMPTS, n=6, **SAMPLING))
    for config in ({"max_num_seqs": 1}, {"max_num_seqs": 7, "devices": ("cpu",) * 3}):
        found = MODEL.engine(**config).generate(requests(PROMPTS, n=3, **SAMPLING))
        for few, many in zip(found, expected, strict=True):
            assert samples(few) == samples(many)[:3]


def test_samples_end_for_themselves_and_the_request_once() -> None:
    engine = MODEL.engine()
    (request,) = requests([PROMPTS[0]], temperature=1.5, n=32, seed=2, max_tokens=40)
    engine.add("k", request)
    (completion,) = finished(engine)
    assert completion.key == "k"
    reasons = {sample.finish_reason for sample in completion.samples}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    counts = [len(sample) for sample in samples(completion)]
    assert min(counts) < max(counts) == 40
    assert completion.completion_tokens == sum(counts)


def test_cancel_drops_all_samples() -> None:
    engine = MODEL.engine(max_num_seqs=2)
    (request,) = requests([PROMPTS[0]], n=4, **SAMPLING)
    engine.add("k", request)
    with pytest.raises(DuplicateRequestError):
        engine.add("k", request)
    engine.step()
    assert engine.progress() == {}
    assert engine.cancel("k")
    assert not engine.cancel("k")
    assert finished(engine) == []
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    engine.add("k", request)
    (completion,) = finished(engine)
    assert len(completion.samples) == 4


def test_a_sample_that_fails_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MODEL.engine()
    wrong, right = requests(PROMPTS[:2], n=3, stop=["never there"], **SAMPLING)
    expected = engine.generate([wrong, right])
    bad = tuple(samples(expected[0])[1][:5])
    read = StopSearch.read
    so_far: dict[int, tuple[int, ...]] = {}

    def choking(self, tokens):
        so_far[id(self)] = (*so_far.get(id(self), ()), *tokens)
        if so_far[id(self)] == bad:
            raise ValueError("can't decode")
        return read(self, tokens)

    monkeypatch.setattr(StopSearch, "read", choking)
    found = engine.generate([wrong, right])
    assert found[0].finish_reason is FinishReason.ERROR
    assert "can't decode" in str(found[0].error)
    assert samples(found[1]) == samples(expected[1])
    assert not engine.has_unfinished()
    assert engine.num_running == 0


def test_greedy_samples_are_refused_as_in_vllm() -> None:
    with pytest.raises(InvalidRequestError, match=r"'n' is 2: greedy"):
        GenerationRequest.parse({"id": "x", "prompt": "a", "sampling": {"n": 2}})
    params = SamplingParams(num_return_sequences=3, do_sample=True)
    assert (params.n, params.temperature) == (3, 1.0)
