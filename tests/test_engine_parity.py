"""The engine's greedy text and its logits are those of transformers, however it is cut."""

from __future__ import annotations

import pytest
import torch
from kits.engine_models import (
    CONFIGS,
    LAYERS,
    VOCAB,
    make_model,
    mixed_prompts,
    requests,
    tiny_model,
)

from engine.engine import Engine
from engine.requests.sequence import Sequence
from engine.scheduling.round import Round
from queue_api.wire.schemas import FinishReason, GenerationRequest, SamplingParams

ARCHITECTURES = [*CONFIGS, "demo"]
PROMPTS = mixed_prompts()


def token_ids(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(requests(prompts))]


def logits_in_chunks(engine: Engine, tokens: list[int], chunks: list[int]) -> torch.Tensor:
    """The engine's logits after each chunk of `tokens`, run through its stages by hand."""
    sequence = Sequence.create(
        "k", 0, tokens, [], SamplingParams(max_tokens=1), seed=0, added_at=0.0, num_stages=1
    )
    sequence.first_slot = 3
    outputs = []
    for count in chunks:
        batch = Round.pack([(sequence, count)]).batch
        batch.logit_rows = torch.tensor([count - 1])
        passed = batch.token_ids[None]
        for stage in engine.stages:
            passed = stage.run(batch, passed)
        outputs.append(passed)
        sequence.num_cached += count
    return torch.cat(outputs)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_text_matches_generate(name: str, num_stages: int, use_cache: bool) -> None:
    model = tiny_model(name)
    expected = [model.greedy(prompt) for prompt in PROMPTS]
    # With a cache, a budget below the longest prompt: prompts are read in chunks among decodes.
    engine = model.engine(
        devices=("cpu",) * num_stages,
        use_cache=use_cache,
        max_num_seqs=16,
        max_batch_tokens=24 if use_cache else 256,
    )
    assert {stage.mode for stage in engine.stages} == {"packed"}
    assert token_ids(engine, PROMPTS) == expected
    for i in (8, 11):
        assert token_ids(engine, [PROMPTS[i]]) == [expected[i]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_threaded_stages_match_generate(name: str) -> None:
    model = tiny_model(name)
    engine = model.engine(
        devices=("cpu", "cpu", "cpu"), pipeline="threads", max_num_seqs=9, max_batch_tokens=16
    )
    try:
        assert token_ids(engine, PROMPTS) == [model.greedy(prompt) for prompt in PROMPTS]
    finally:
        engine.close()


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_match_after_every_chunk(name: str, num_stages: int) -> None:
    model = tiny_model(name)
    tokens = max(PROMPTS, key=len)[:30]
    chunks = [13, 1, 1, 9, 1, 5]
    engine = model.engine(devices=("cpu",) * num_stages)
    found = logits_in_chunks(engine, tokens, chunks)
    ends = torch.tensor(chunks).cumsum(0) - 1
    torch.testing.assert_close(found, model.logits(tokens)[ends], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bounds", [(1, 2, 5), (3, 4, 5)])
def test_custom_partition_matches_generate(bounds: tuple[int, ...]) -> None:
    model = tiny_model("mistral")
    engine = model.engine(devices=("cpu",) * 4, partition="custom", layer_bounds=bounds)
    assert [stage.spec.num_layers for stage in engine.stages] == [
        end - first for first, end in zip((0, *bounds), (*bounds, LAYERS), strict=True)
    ]
    assert token_ids(engine, PROMPTS[:4]) == [model.greedy(prompt) for prompt in PROMPTS[:4]]


@pytest.mark.parametrize("budget", [1, 7, 512])
def test_prompt_chunks_of_any_size_give_the_same_text(budget: int) -> None:
    model = tiny_model("gemma2")
    prompt = max(PROMPTS, key=len)
    engine = model.engine(max_num_seqs=1, max_batch_tokens=budget)
    assert token_ids(engine, [prompt]) == [model.greedy(prompt)]


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_model_outside_the_attention_interface_runs_sequence_by_sequence(
    num_stages: int, use_cache: bool, tmp_path
) -> None:
    """Bloom has ALiBi biases: it can't be packed and must still be right."""
    import transformers

    config = transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=4, n_head=4, initializer_range=0.6, eos_token_id=2
    )
    model = make_model(config, tmp_path)
    engine = model.engine(
        devices=("cpu",) * num_stages,
        use_cache=use_cache,
        max_model_len=128,
        max_num_seqs=5,
        max_batch_tokens=24,
    )
    assert {stage.mode for stage in engine.stages} == {"single"}
    assert token_ids(engine, PROMPTS) == [model.greedy(prompt) for prompt in PROMPTS]


def test_resumed_text_goes_on_as_if_never_interrupted() -> None:
    model = tiny_model("llama")
    prompt = PROMPTS[3]
    expected = model.greedy(prompt)
    engine = model.engine(devices=("cpu", "cpu"))
    (request,) = requests([prompt])
    for known in (1, 10, len(expected)):
        engine.add("k", request, generated=expected[:known])
        (completion,) = run(engine)
        assert completion.token_ids == expected
        assert completion.completion_tokens == len(expected)


def test_chat_messages_match_generate_on_the_rendered_template() -> None:
    model = tiny_model("demo")
    engine = model.engine(devices=("cpu", "cpu"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.encode(rendered, add_special_tokens=False)
    expected = model.greedy(prompt, 16)
    request = GenerationRequest.parse(
        {"id": "q", "messages": messages, "sampling": {"max_tokens": 16}}
    )
    (completion,) = engine.generate([request])
    assert completion.token_ids == expected
    assert completion.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert completion.prompt_tokens == len(prompt)
    assert completion.finish_reason is FinishReason.STOP


def run(engine: Engine) -> list:
    completions = []
    while engine.has_unfinished():
        completions += engine.step()
    return completions
