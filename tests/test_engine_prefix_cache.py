"""Texts that begin alike compute that beginning once, and read as if each had done so alone."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kits.engine_models import LAYERS, VOCAB, TinyModel, make_model, requests, tiny_model
from transformers import LlamaConfig

from engine.batch import ForwardBatch
from engine.engine import Engine

RANDOM = random.Random(3)


def tokens(count: int) -> list[int]:
    return [RANDOM.randrange(3, VOCAB) for _ in range(count)]


LONG = tokens(60)
PROMPTS = [LONG[:shared] + tokens(own) for shared in (0, 16, 33, 60) for own in (1, 7, 20)]
PROMPTS += [LONG, LONG[:32], LONG[:33]]  # one the beginning of another
NEW = 6


def watch(engine: Engine) -> list[ForwardBatch]:
    """All micro-batches that the first stage runs from now on."""
    seen: list[ForwardBatch] = []
    stage = engine.stages[0]
    run = stage.run

    def watched(batch: ForwardBatch, inbound: torch.Tensor) -> torch.Tensor:
        seen.append(batch)
        return run(batch, inbound)

    stage.run = watched  # type: ignore[method-assign]
    return seen


def texts(engine: Engine, prompts: list[list[int]], max_tokens: int = NEW) -> list[list[int]]:
    done = engine.generate(requests(prompts, max_tokens=max_tokens))
    return [completion.token_ids for completion in done]


# --------------------------------------------------------------------- 256 requests, 200 tokens

NUM_REQUESTS, SHARED = 256, 200


@pytest.fixture(scope="module")
def long_model(tmp_path_factory) -> TinyModel:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return make_model(config, tmp_path_factory.mktemp("long"))


def generate_all(model: TinyModel, prompts: list[list[int]]) -> list[list[int]]:
    """`transformers.generate`, prompts of the same length at a time: no padding."""
    found: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:
        chosen = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in chosen])
        with torch.inference_mode():
            out = model.reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False
            )
        for i, row in zip(chosen, out[:, length:].tolist(), strict=True):
            found[i] = row[: row.index(2) + 1] if 2 in row else row
    return [found[i] for i in range(len(prompts))]


def test_a_shared_prefix_over_256_requests_is_computed_once(long_model) -> None:
    prefix = tokens(SHARED)
    prompts = [prefix + tokens(1 + i % 8) for i in range(NUM_REQUESTS)]
    expected = generate_all(long_model, prompts)
    computed = []
    for shares, slots in ((False, None), (True, None), (True, 16 * 232)):
        engine = long_model.engine(prefix_caching=shares, kv_cache_tokens=slots)
        batches = watch(engine)
        assert texts(engine, prompts, max_tokens=3) == expected
        computed.append(sum(batch.num_tokens for batch in batches))
        assert engine.metrics.computed_tokens == computed[-1]
        assert engine.metrics.prompt_tokens == sum(map(len, prompts))
        assert engine.metrics.cached_prompt_tokens >= 0.9 * SHARED * NUM_REQUESTS * shares
    without, with_room, with_little = computed
    assert without - with_room >= 0.9 * SHARED * NUM_REQUESTS
    assert without - with_little >= 0.9 * SHARED * NUM_REQUESTS


# ---------------------------------------------------------------------------- whatever happens


@functools.cache
def engine(name: str, num_stages: int, pipeline: str) -> Engine:
    """So few slots that ended texts have to go, and chunks smaller than what is shared."""
    engine = tiny_model(name).engine(
        devices=("cpu",) * num_stages,
        pipeline=pipeline,
        max_num_seqs=5,
        max_batch_tokens=20,
        kv_cache_tokens=250,
    )
    stage = engine.stages[-1]
    run = stage.run

    def fails_when_told(batch: ForwardBatch, inbound: torch.Tensor) -> torch.Tensor:
        out = run(batch, inbound)
        if engine.failures and batch.num_tokens > 1:  # type: ignore[attr-defined]
            engine.failures.pop()  # type: ignore[attr-defined]
            raise MemoryError
        return out

    stage.run = fails_when_told  # type: ignore[method-assign]
    engine.failures = []  # type: ignore[attr-defined]
    return engine


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "resume", "cancel", "fail", "forget"]),
        st.integers(0, len(PROMPTS) - 1),
        st.integers(0, 3),
    ),
    max_size=30,
)


@pytest.mark.parametrize(
    ("name", "num_stages", "pipeline"),
    [("mistral", 1, "inline"), ("llama", 3, "threads"), ("gemma2", 2, "threads")],
)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(events=EVENTS)
def test_text_is_generate_s_and_no_slot_leaks(name, num_stages, pipeline, events) -> None:
    """Each event is something that happens, and rounds that pass afterwards."""
    tested, model = engine(name, num_stages, pipeline), tiny_model(name)
    tested.failures.clear()
    known: dict[str, int] = {}
    done: dict[str, list[int]] = {}

    def step() -> None:
        done.update((completion.key, completion.token_ids) for completion in tested.step())

    for number, (event, index, rounds) in enumerate(events):
        if event == "cancel":
            if active := [key for key in known if key not in done]:
                victim = active[index % len(active)]
                assert tested.cancel(victim)
                del known[victim]
        elif event == "fail":
            tested.failures.append(None)
        elif event == "forget":
            tested.reset_prefix_cache()
        else:
            prompt = PROMPTS[index]
            # not all of a short one: it would be done, and none to cancel
            generated = model.greedy(prompt, NEW)[:-1][:2] if event == "resume" else []
            tested.add(f"{number}", requests([prompt], max_tokens=NEW)[0], generated=generated)
            known[f"{number}"] = index
        for _ in range(rounds):
            step()
    while tested.has_unfinished():
        step()
    assert done == {key: model.greedy(PROMPTS[i], NEW) for key, i in known.items()}
    assert tested.num_running == tested.num_waiting == 0
    tested.reset_prefix_cache()
    allocator = tested.scheduler.allocator
    assert allocator.num_free == allocator.num_slots
    assert allocator.allocate(allocator.num_slots) == 0
    allocator.free(0)


# --------------------------------------------------------------------------------- single cases


def test_an_ended_text_s_beginning_is_still_there() -> None:
    engine = tiny_model("llama").engine(max_num_seqs=1, kv_cache_tokens=300)
    texts(engine, [LONG])
    batches = watch(engine)
    prompt = LONG[:45] + tokens(5)
    assert texts(engine, [prompt]) == [tiny_model("llama").greedy(prompt, NEW)]
    assert batches[0].num_tokens == 5
    assert engine.metrics.cached_prompt_tokens == 45
    assert engine.metrics.prefix_hit_rate == 45 / (60 + 50)


def test_of_several_beginnings_the_longest_is_copied() -> None:
    model = tiny_model("llama")
    engine = model.engine(max_num_seqs=1, kv_cache_tokens=600)
    ways = [LONG[:40] + tokens(9) for _ in range(3)]
    texts(engine, ways)
    for way in ways:
        batches = watch(engine)
        prompt = way[:46] + tokens(5)
        assert texts(engine, [prompt]) == [model.greedy(prompt, NEW)]
        assert batches[0].num_tokens == 5


def test_who_goes_on_alike_within_a_block_waits_for_it() -> None:
    model = tiny_model("llama")
    engine = model.engine(max_num_seqs=4)
    prompts = [LONG[:44] + tokens(own) for own in (3, 3, 9)]
    assert texts(engine, prompts) == [model.greedy(prompt, NEW) for prompt in prompts]
    assert engine.metrics.cached_prompt_tokens == 2 * 44


def test_new_tokens_are_shared_as_well() -> None:
    model = tiny_model("llama")
    engine = model.engine(max_num_seqs=1, kv_cache_tokens=300)
    first = texts(engine, [LONG], max_tokens=24)[0]
    assert len(first) == 24
    batches = watch(engine)
    turn = LONG + first + tokens(3)
    assert texts(engine, [turn]) == [model.greedy(turn, NEW)]
    assert batches[0].num_tokens <= 4  # the last new token never went through the model


def test_a_prompt_whose_logits_are_wanted_is_computed_whole() -> None:
    engine = tiny_model("llama").engine()
    texts(engine, [LONG])
    (alone,) = tiny_model("llama").engine().generate(requests([LONG], prompt_logprobs=1))
    (completion,) = engine.generate(requests([LONG], prompt_logprobs=1))
    assert engine.metrics.cached_prompt_tokens == 0
    assert len(completion.prompt_logprobs) == len(alone.prompt_logprobs) == len(LONG)
    texts(engine, [LONG])
    assert engine.metrics.cached_prompt_tokens == len(LONG) - 1


def test_samples_share_their_prompt() -> None:
    engine = tiny_model("llama").engine()
    engine.generate(requests([LONG], n=4, temperature=1.0, seed=1))
    assert engine.metrics.cached_prompt_tokens == 3 * (len(LONG) - 1)


def test_a_follower_goes_on_when_the_one_it_waits_for_is_cancelled() -> None:
    model = tiny_model("llama")
    engine = model.engine(max_num_seqs=4, max_batch_tokens=8)
    for i, request in enumerate(requests([LONG, LONG, LONG], max_tokens=NEW)):
        engine.add(str(i), request)
    engine.step()
    engine.cancel("0")
    done = {}
    while engine.has_unfinished():
        done.update((c.key, c.token_ids) for c in engine.step())
    assert done == dict.fromkeys("12", model.greedy(LONG, NEW))


def test_others_go_ahead_of_those_that_wait() -> None:
    engine = tiny_model("llama").engine(max_num_seqs=4, max_batch_tokens=64)
    batches = watch(engine)
    texts(engine, [LONG, LONG, tokens(3)])
    assert [segment.count for segment in batches[0].segments] == [60, 3]


@pytest.mark.parametrize("off", [{"prefix_caching": False}, {"use_cache": False}], ids=str)
def test_nothing_is_shared_when_it_is_off(off) -> None:
    model = tiny_model("llama")
    engine = model.engine(**off)
    assert texts(engine, [LONG, LONG]) == [model.greedy(LONG, NEW)] * 2
    assert engine.metrics.cached_prompt_tokens == 0
    assert engine.metrics.prompt_tokens == 2 * len(LONG)
