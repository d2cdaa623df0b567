"""Penalties, biases and bounds change logits as transformers and OpenAI's formula have it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kits.engine_models import EOS, VOCAB, TinyModel, mixed_prompts, requests, tiny_model
from transformers import (
    AutoTokenizer,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from engine.engine import Engine
from engine.models.tokenizer import Tokenizer
from engine.requests.completion import Completion
from engine.requests.sequence import Sequence
from engine.sampling.logits import LogitsChange, change_logits
from engine.sampling.sampler import choose_tokens, keep_min_p
from queue_api.wire.errors import InvalidRequestError
from queue_api.wire.schemas import GenerationRequest, SamplingParams

MODEL = tiny_model("llama")
TOKENIZER = AutoTokenizer.from_pretrained(MODEL.folder)
PROMPTS = mixed_prompts(10)
EVERYTHING = {
    "temperature": 0.8,
    "min_p": 0.02,
    "min_tokens": 6,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": {40: 3.0, 41: -100.0},
    "bad_words": ["ab", "c"],
    "logprobs": 2,
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return MODEL.engine(max_num_seqs=8)


def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER, frozenset([EOS]), VOCAB)


def changed(logits: torch.Tensor, prompt: list[int], new: list[int], **sampling) -> torch.Tensor:
    """`logits` [V] as a request with these fields has them behind `prompt` and `new`."""
    params = SamplingParams(**sampling)
    change = LogitsChange.of(params, tokenizer())
    sequence = Sequence.create(
        "k", 0, prompt, new, params, seed=0, added_at=0.0, num_stages=1, change=change
    )
    return change_logits(logits[None], [sequence.sampling_row()])[0]


def some_logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def run(engine: Engine, prompt: list[int], **sampling) -> Completion:
    (completion,) = engine.generate(requests([prompt], **sampling))
    return completion


def resumed(engine: Engine, request: GenerationRequest, generated: list[int]) -> Completion:
    engine.add("resumed", request, generated=generated, seed_key=request.id)
    while not (done := engine.step()):
        pass
    return done[0]


# -------------------------------------------------------------------- transformers is the oracle


@pytest.mark.parametrize("penalty", [1.3, 0.7, 5.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, prompt, new = some_logits(), [5, 6, 5, 40], [7, 7, 90]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + new]), logits[None])
    assert torch.equal(changed(logits, prompt, new, repetition_penalty=penalty), expected[0])


def test_presence_and_frequency_penalties_follow_openais_formula() -> None:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, of the new text alone."""
    logits, prompt, new = some_logits(1), [5, 6, 6], [7, 7, 9, 6]
    for frequency, presence in ((0.5, 0.0), (0.0, 1.5), (-1.0, 0.25), (2.0, -2.0)):
        counts = np.bincount(new, minlength=VOCAB)
        expected = logits.double().numpy() - counts * frequency - (counts > 0) * presence
        found = changed(logits, prompt, new, frequency_penalty=frequency, presence_penalty=presence)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_logit_bias_is_transformers_sequence_bias() -> None:
    logits, bias = some_logits(2), {5: 2.5, 17: -100.0, 258: 0.125}
    oracle = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = oracle(torch.tensor([[1, 2]]), logits[None].clone())[0]
    assert torch.equal(changed(logits, [1], [2], logit_bias=bias), expected)


@pytest.mark.parametrize("num_new", [0, 3, 4, 9])
def test_min_tokens_forbids_endings_as_min_new_tokens_does(num_new: int) -> None:
    logits, prompt, new = some_logits(3), [5, 6], [8] * num_new
    oracle = MinNewTokensLengthLogitsProcessor(len(prompt), 4, [EOS, 77])
    expected = oracle(torch.tensor([prompt + new]), logits[None])[0]
    found = changed(logits, prompt, new, min_tokens=4, stop_token_ids=[77])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("new", [[], list(b"xa"), list(b"a"), list(b"ab"), list(b"zzab")], ids=str)
def test_bad_words_are_forbidden_as_in_transformers(new: list[int]) -> None:
    letters = TOKENIZER.convert_tokens_to_ids(list("abcxz"))
    ids = dict(zip(b"abcxz", letters, strict=True))
    new = [ids[byte] for byte in new]
    words = [TOKENIZER.encode(word, add_special_tokens=False) for word in ("abc", "b", "zz")]
    logits = some_logits(4)
    # of the new text alone, as vLLM has it; a first token keeps transformers from having nothing
    context = torch.tensor([[EOS, *new]])
    expected = NoBadWordsLogitsProcessor(words)(context, logits[None].clone())[0]
    assert torch.equal(changed(logits, [5], new, bad_words=["abc", "b", "zz"]), expected)


@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.3, 0.99, 1.0])
def test_min_p_keeps_the_tokens_of_transformers(min_p: float) -> None:
    scores = torch.randn(5, 300, generator=torch.Generator().manual_seed(6)) * 2
    scores -= scores.amax(dim=-1, keepdim=True)
    expected = MinPLogitsWarper(min_p)(None, scores)
    assert torch.equal(keep_min_p(scores, [min_p] * 5), expected)


def test_min_p_comes_before_top_p_as_in_vllm() -> None:
    logits = some_logits(7)[:40] * 0.3
    scores = logits[None]
    for warper in (TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.3), TopPLogitsWarper(0.6)):
        scores = warper(None, scores)
    params = SamplingParams(temperature=1.5, min_p=0.3, top_p=0.6, max_tokens=1)
    sequences = [
        Sequence.create("k", 0, [1], [], params, seed=seed, added_at=0.0, num_stages=1)
        for seed in range(1500)
    ]
    drawn = set(
        choose_tokens(
            logits.expand(len(sequences), -1), [sequence.sampling_row() for sequence in sequences]
        )
    )
    assert drawn == set(scores[0].isfinite().nonzero()[:, 0].tolist())


def generate(model: TinyModel, prompt: list[int], **options) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            **options,
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gemma3", "demo"])
def test_greedy_text_with_penalty_matches_generate(name: str, num_stages: int) -> None:
    model = tiny_model(name)
    engine = model.engine(devices=("cpu",) * num_stages, max_num_seqs=16, max_batch_tokens=24)
    expected = [generate(model, prompt, repetition_penalty=1.3) for prompt in PROMPTS]
    assert expected != [model.greedy(prompt) for prompt in PROMPTS]
    penalized = requests(PROMPTS, repetition_penalty=1.3)
    assert [c.token_ids for c in engine.generate(penalized)] == expected
    alone = [engine.generate([request])[0].token_ids for request in penalized[:3]]
    assert alone == expected[:3]
    plain = requests(PROMPTS)
    mixed = engine.generate([r for pair in zip(penalized, plain, strict=True) for r in pair])
    assert [c.token_ids for c in mixed[::2]] == expected
    assert [c.token_ids for c in mixed[1::2]] == [model.greedy(prompt) for prompt in PROMPTS]
    engine.close()


def test_min_tokens_text_matches_generate() -> None:
    engine = MODEL.engine()
    prompts = [[token, 7] for token in range(3, 60)]  # some end before their 20th token
    expected = [generate(MODEL, prompt, min_new_tokens=20) for prompt in prompts]
    assert expected != [MODEL.greedy(prompt) for prompt in prompts]
    found = [c.token_ids for c in engine.generate(requests(prompts, min_tokens=20))]
    assert found == expected


# ------------------------------------------------------------------------------------ log-probs


def test_logprobs_are_of_the_models_own_distribution(engine: Engine) -> None:
    prompt = PROMPTS[0]
    plain = run(engine, prompt, logprobs=3)
    odd = run(engine, prompt, logprobs=3, temperature=1.7, repetition_penalty=1.5, ignore_eos=True)
    assert plain.token_ids == MODEL.greedy(prompt)
    assert all(token.rank == 1 for token in plain.logprobs)
    assert any(token.rank > 1 for token in odd.logprobs)
    for completion in (plain, odd):
        tokens = completion.token_ids
        expected = MODEL.logits(prompt + tokens).log_softmax(-1)[len(prompt) - 1 : -1]
        assert [token.token_id for token in completion.logprobs] == tokens
        for row, token in zip(expected, completion.logprobs, strict=True):
            assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
            assert token.rank == 1 + int((row > row[token.token_id]).sum())
            assert token.token == TOKENIZER.decode([token.token_id])
            values, ids = row.topk(3)
            assert [entry.token_id for entry in token.top] == ids.tolist()
            assert [entry.logprob for entry in token.top] == pytest.approx(values, abs=1e-4)


def test_logprobs_only_where_asked_for(engine: Engine) -> None:
    asked, not_asked = requests(PROMPTS[:2], logprobs=0)[0], requests(PROMPTS[:2])[1]
    with_them, without = engine.generate([asked, not_asked])
    assert without.logprobs is None
    assert [token.top for token in with_them.logprobs] == [[]] * len(with_them.token_ids)


def test_resumed_logprobs_are_whole(engine: Engine) -> None:
    (request,) = requests([PROMPTS[1]], temperature=0.9, logprobs=2, ignore_eos=True)
    (whole,) = engine.generate([request])
    again = resumed(engine, request, whole.token_ids[:7])
    assert again.token_ids == whole.token_ids
    assert [t.token_id for t in again.logprobs] == whole.token_ids


# ------------------------------------------------------------------- whoever else is in the batch


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_text_with_every_field_does_not_depend_on_the_neighbours(temperature: float) -> None:
    sampling = {**EVERYTHING, "temperature": temperature, "ignore_eos": True}
    (request,) = requests([PROMPTS[0]], **sampling)
    alone = MODEL.engine(max_num_seqs=1).generate([request])[0]
    others = requests(PROMPTS[1:], temperature=1.1, presence_penalty=1.0, max_tokens=9)
    engine = MODEL.engine(max_num_seqs=7, max_batch_tokens=31, devices=("cpu", "cpu"))
    among = engine.generate([*others[:4], request, *others[4:]])[4]
    assert among.token_ids == alone.token_ids
    found = [token.logprob for token in among.logprobs]
    assert found == pytest.approx([token.logprob for token in alone.logprobs], abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("cut", [1, 5, 17])
def test_resumed_text_is_that_of_an_undisturbed_run(
    engine: Engine, temperature: float, cut: int
) -> None:
    sampling = {**EVERYTHING, "temperature": temperature, "logprobs": None, "ignore_eos": True}
    (request,) = requests([PROMPTS[3]], **sampling)
    (whole,) = engine.generate([request])
    assert resumed(engine, request, whole.token_ids[:cut]).token_ids == whole.token_ids


# ---------------------------------------------------------------------------- words and endings


def test_bad_words_are_not_in_the_text(engine: Engine) -> None:
    prompt = PROMPTS[2]
    text = run(engine, prompt, ignore_eos=True).text
    word = next(text[i : i + 2] for i in range(20) if text[i : i + 2].isascii())
    assert word not in run(engine, prompt, ignore_eos=True, bad_words=[word]).text


def test_the_stop_string_is_included_if_asked_for(engine: Engine) -> None:
    whole = run(engine, [40, 41, 42]).text
    stop = whole[7:9]
    completion = run(engine, [40, 41, 42], stop=[stop], include_stop_str_in_output=True)
    assert completion.text == whole[: whole.index(stop) + 2]


def test_a_stop_string_within_min_tokens_is_no_end(engine: Engine) -> None:
    whole = run(engine, [40, 41, 42], ignore_eos=True)
    early = TOKENIZER.decode(whole.token_ids[:3], skip_special_tokens=True)
    assert run(engine, [40, 41, 42], stop=[early], ignore_eos=True).text == ""
    late = run(engine, [40, 41, 42], stop=[early], min_tokens=3, ignore_eos=True)
    assert late.text.startswith(early)
    ended = run(engine, [40, 41, 42], stop=[early], min_tokens=2, ignore_eos=True)
    assert ended.completion_tokens == 3


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, f"token id {VOCAB} in 'logit_bias' is outside"),
        ({"bad_words": ["\ud800"]}, "tokenize"),
    ],
    ids=["bias", "word"],
)
def test_what_the_model_does_not_have_is_refused(engine: Engine, sampling, message: str) -> None:
    request = GenerationRequest(
        id="r", prompt=[5], sampling=SamplingParams.model_construct(max_tokens=8, **sampling)
    )
    with pytest.raises(InvalidRequestError, match=message):
        engine.add("r", request)
    assert not engine.has_unfinished()
