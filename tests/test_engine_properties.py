"""Whatever arrives or is cancelled, and whenever: no text is another's business."""

from __future__ import annotations

import functools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kits.engine_models import mixed_prompts, requests, tiny_model

from engine.engine import Engine
from queue_api.wire.schemas import GenerationRequest

PROMPTS = mixed_prompts(12, longest=30)


@functools.cache
def engine(name: str, num_stages: int, pipeline: str) -> Engine:
    """Few slots and a small budget, so that texts wait, are read in chunks and move about."""
    return tiny_model(name).engine(
        devices=("cpu",) * num_stages,
        pipeline=pipeline,
        max_num_seqs=5,
        max_batch_tokens=12,
        kv_cache_tokens=120,
    )


@functools.cache
def request(name: str, index: int) -> GenerationRequest:
    """Every third is greedy, the others are drawn."""
    temperature = 0.0 if index % 3 == 0 else 1.1
    return requests([PROMPTS[index]], max_tokens=4 + index, temperature=temperature, seed=index)[0]


@functools.cache
def alone(name: str, index: int) -> list[int]:
    (completion,) = tiny_model(name).engine(max_num_seqs=1).generate([request(name, index)])
    return completion.token_ids


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "cancel", "resume"]),
        st.integers(0, len(PROMPTS) - 1),
        st.integers(0, 3),
    ),
    max_size=20,
)


@pytest.mark.parametrize(
    ("name", "num_stages", "pipeline"),
    [("mistral", 1, "inline"), ("llama", 3, "threads"), ("gemma3", 2, "inline")],
)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(events=EVENTS)
def test_text_never_depends_on_arrivals_and_cancels(name, num_stages, pipeline, events) -> None:
    """Each event is something that happens to a request, and rounds that pass afterwards."""
    tested = engine(name, num_stages, pipeline)
    known: dict[str, int] = {}
    done: dict[str, list[int]] = {}

    def step() -> None:
        done.update((completion.key, completion.token_ids) for completion in tested.step())

    for number, (event, index, rounds) in enumerate(events):
        key = f"{number}"
        if event == "cancel":
            active = [k for k in known if k not in done]
            if active:
                victim = active[index % len(active)]
                assert tested.cancel(victim)
                del known[victim]
        else:
            generated = alone(name, index)[: index // 2] if event == "resume" else []
            tested.add(key, request(name, index), generated=generated)
            known[key] = index
        for _ in range(rounds):
            step()
    while tested.has_unfinished():
        step()
    assert done == {key: alone(name, index) for key, index in known.items()}
    assert tested.num_running == tested.num_waiting == 0
    tested.reset_prefix_cache()
    allocator = tested.scheduler.allocator
    assert allocator.num_free == allocator.num_slots
