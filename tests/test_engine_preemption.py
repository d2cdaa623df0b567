"""Sequences that move, or are preempted and recomputed, have the text of undisturbed ones."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kits.engine_models import mixed_prompts, requests, tiny_model

from engine.batch import ForwardBatch
from engine.engine import Engine
from engine.requests.completion import Completion
from queue_api.wire.errors import MaxTokensTooLargeError
from queue_api.wire.schemas import GenerationRequest

PROMPTS = mixed_prompts(6, longest=30)
PROMPTS += [PROMPTS[0] + PROMPTS[i] for i in (1, 2)]  # that begin alike
NEW = 60
SLOTS = 130
"""Little more than the longest text, of which five may run."""

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.1, "seed": 4, "repetition_penalty": 1.2},
    "logprobs": {"logprobs": 2},
    "prompt_logprobs": {"prompt_logprobs": 1, "logprobs": 0},
    "samples": {"n": 2, "temperature": 1.2, "seed": 9},
    "form": {"structured_outputs": {"regex": "[a-f]{50}"}, "temperature": 1.0, "seed": 2},
}


@functools.cache
def request(kind: str, index: int) -> GenerationRequest:
    return requests([PROMPTS[index]], max_tokens=NEW, **KINDS[kind])[0]


@functools.cache
def alone(name: str, kind: str, index: int) -> Completion:
    """The request's completion where nobody else is, and where there is room for all of it."""
    (completion,) = roomy(name).generate([request(kind, index)])
    return completion


@functools.cache
def roomy(name: str) -> Engine:
    return tiny_model(name).engine(max_num_seqs=1, prefix_caching=False)


def check(found: Completion, expected: Completion) -> None:
    assert found.error is None
    assert found.token_ids == expected.token_ids
    assert found.finish_reason == expected.finish_reason
    assert found.structured_output == expected.structured_output
    assert [s.token_ids for s in found.samples] == [s.token_ids for s in expected.samples]
    for name in ("logprobs", "prompt_logprobs"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        for a, b in zip(ours or [], theirs or [], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.token_id == b.token_id
                assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


def tight(name: str, num_stages: int = 1, **config: Any) -> Engine:
    return tiny_model(name).engine(
        devices=("cpu",) * num_stages,
        **{"max_num_seqs": 5, "max_batch_tokens": 24, "kv_cache_tokens": SLOTS, **config},
    )


@functools.cache
def engine(name: str, num_stages: int, pipeline: str, prefix_caching: bool) -> Engine:
    engine = tight(name, num_stages, pipeline=pipeline, prefix_caching=prefix_caching)
    stage = engine.stages[0]
    run = stage.run

    def fails_when_told(batch: ForwardBatch, inbound: Any) -> Any:
        if engine.failures and batch.num_tokens > 1:  # type: ignore[attr-defined]
            engine.failures.pop()  # type: ignore[attr-defined]
            raise MemoryError  # before anything is copied in this stage
        return run(batch, inbound)

    stage.run = fails_when_told  # type: ignore[method-assign]
    engine.failures = []  # type: ignore[attr-defined]
    return engine


EVENTS = st.lists(
    st.tuples(
        st.sampled_from([*KINDS, *KINDS, "greedy", "cancel", "cancel", "fail"]),
        st.integers(0, len(PROMPTS) - 1),
        st.integers(0, 25),
    ),
    max_size=10,
)


@pytest.mark.parametrize(
    ("name", "num_stages", "pipeline", "prefix_caching"),
    [
        ("llama", 1, "inline", False),
        ("llama", 3, "threads", True),
        ("gemma2", 2, "threads", False),
        ("mistral", 2, "inline", True),
    ],
)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(events=EVENTS)
def test_completions_are_those_of_undisturbed_texts(
    name, num_stages, pipeline, prefix_caching, events
) -> None:
    """Each event is something that happens, and rounds that pass afterwards."""
    tested = engine(name, num_stages, pipeline, prefix_caching)
    tested.failures.clear()
    tested.scheduler.max_batch_tokens = tested._budget.tokens = tested._budget.limit
    known: dict[str, tuple[str, int]] = {}
    done: dict[str, Completion] = {}

    def step() -> None:
        done.update((completion.key, completion) for completion in tested.step())

    for number, (event, index, rounds) in enumerate(events):
        if event == "cancel":
            if active := [key for key in known if key not in done]:
                victim = active[index % len(active)]
                assert tested.cancel(victim)
                del known[victim]
        elif event == "fail":
            tested.failures.append(None)
        else:
            tested.add(f"{number}", request(event, index))
            known[f"{number}"] = (event, index)
        for _ in range(rounds):
            step()
    while tested.has_unfinished():
        step()
    assert done.keys() == known.keys()
    for key, (kind, index) in known.items():
        check(done[key], alone(name, kind, index))
    assert tested.num_running == tested.num_waiting == 0
    tested.reset_prefix_cache()
    allocator = tested.scheduler.allocator
    assert allocator.num_free == allocator.num_slots


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize(("num_stages", "pipeline"), [(1, "inline"), (3, "threads")])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_preempted_texts_match_generate(name, num_stages, pipeline, prefix_caching) -> None:
    model = tiny_model(name)
    tested = tight(name, num_stages, pipeline=pipeline, prefix_caching=prefix_caching)
    done = tested.generate(requests(PROMPTS, max_tokens=NEW))
    tested.close()
    assert [c.token_ids for c in done] == [model.greedy(prompt, NEW) for prompt in PROMPTS]
    assert tested.metrics.preemptions > 0
    assert tested.metrics.moved_tokens > 0
    assert f"{tested.metrics.preemptions} preemptions" in tested.describe_work()
    for completion in done:
        times = (completion.added_at, completion.admitted_at, completion.first_token_at)
        assert list(times) == sorted(times), "admitted means admitted first"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "greedy"])
def test_what_was_asked_for_is_there_once_after_a_preemption(kind: str) -> None:
    tested = tight("llama", 2, pipeline="threads")
    indices = [4, 5, 6, 7]
    for index in indices:
        tested.add(f"{index}", request(kind, index))
    done: dict[str, Completion] = {}
    while tested.has_unfinished():
        done.update((completion.key, completion) for completion in tested.step())
    tested.close()
    assert tested.metrics.preemptions > 0
    for index in indices:
        check(done[f"{index}"], alone("llama", kind, index))


def test_texts_that_run_one_by_one_are_preempted_with_their_caches() -> None:
    tested = tight("llama", 2, prefix_caching=False)
    for stage in tested.stages:
        stage.pool = None
        stage.set_mode("single")
    done = tested.generate(requests(PROMPTS, max_tokens=NEW))
    model = tiny_model("llama")
    assert [c.token_ids for c in done] == [model.greedy(prompt, NEW) for prompt in PROMPTS]
    assert tested.metrics.preemptions > 0
    assert not any(stage._caches for stage in tested.stages)


def test_tokens_of_a_preempted_text_are_in_the_checkpoint() -> None:
    tested = tight("llama")
    for index in range(4):
        tested.add(f"{index}", requests([PROMPTS[index]], max_tokens=NEW, ignore_eos=True)[0])
    while not tested.metrics.preemptions:
        tested.step()
    preempted = tested.scheduler.waiting[0]
    progress = tested.progress()
    assert len(progress[preempted.key]) > 0
    expected = tiny_model("llama").greedy(PROMPTS[int(preempted.key)], NEW)
    assert (
        list(progress[preempted.key][: len(expected)]) == expected[: len(progress[preempted.key])]
    )


def test_a_request_that_could_never_fit_is_refused_when_added() -> None:
    tested = tiny_model("llama").engine(kv_cache_tokens=60)
    with pytest.raises(MaxTokensTooLargeError):
        tested.add("k", requests([[5] * 20], max_tokens=41)[0])
    assert not tested.has_unfinished()


def test_slots_that_fit_one_text_serve_several_one_after_the_other() -> None:
    model = tiny_model("llama")
    tested = tight("llama", kv_cache_tokens=len(PROMPTS[0]) + NEW)
    done = tested.generate(requests([PROMPTS[0]] * 3, max_tokens=NEW))
    assert [c.token_ids for c in done] == [model.greedy(PROMPTS[0], NEW)] * 3
