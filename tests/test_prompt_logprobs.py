"""The prompt's log-probabilities are those of transformers' own forward, however it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kits.engine_models import EOS, VOCAB, make_model, mixed_prompts, requests, tiny_model

from engine.engine import Engine
from engine.requests.completion import Completion
from queue_api.wire.errors import RequestTooLargeError

PROMPTS = mixed_prompts(6)


def check(completion: Completion, prompt: list[int], expected: torch.Tensor, num_top: int) -> None:
    """`expected` [len(prompt), V]: the reference's log-probabilities of what comes next."""
    found = completion.prompt_logprobs
    assert found is not None
    assert len(found) == len(prompt)
    assert found[0] is None
    for token_id, token, row in zip(prompt[1:], found[1:], expected[:-1], strict=True):
        assert token is not None
        assert token.token_id == token_id
        assert token.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
        assert token.rank == 1 + int((row > row[token_id]).sum())
        assert [top.token_id for top in token.top] == row.topk(num_top).indices.tolist()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_batch_tokens": 7, "max_num_seqs": 3},
        {"devices": ("cpu",) * 3},
        {"use_cache": False},
    ],
    ids=["whole", "chunked", "stages", "no cache"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_they_are_transformers_own(name: str, config: dict[str, Any]) -> None:
    model = tiny_model(name)
    engine = model.engine(**config)
    wanted = requests(PROMPTS, max_tokens=4, prompt_logprobs=3)
    done = engine.generate(wanted)
    plain = engine.generate(requests(PROMPTS, max_tokens=4))
    for completion, without, prompt in zip(done, plain, PROMPTS, strict=True):
        check(completion, prompt, model.logits(prompt).log_softmax(-1), 3)
        assert completion.token_ids == without.token_ids
        assert without.prompt_logprobs is None
    engine.close()


def test_where_sequences_run_one_by_one(tmp_path: Path) -> None:
    bloom = transformers.BloomConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        n_layer=4,
        n_head=4,
        initializer_range=0.6,
        eos_token_id=EOS,
    )
    model = make_model(bloom, tmp_path)
    engine = model.engine(max_batch_tokens=9, max_num_seqs=3, max_model_len=128)
    assert {stage.mode for stage in engine.stages} == {"single"}
    done = engine.generate(requests(PROMPTS, max_tokens=4, prompt_logprobs=2))
    for completion, prompt in zip(done, PROMPTS, strict=True):
        assert completion.token_ids == model.greedy(prompt, 4)
        check(completion, prompt, model.logits(prompt).log_softmax(-1), 2)


def test_with_samples_logprobs_and_a_successor() -> None:
    model = tiny_model("llama")
    engine: Engine = model.engine()
    sampling = {"temperature": 1.0, "logprobs": 1, "prompt_logprobs": 0, "max_tokens": 6}
    prompt = PROMPTS[0]
    (several,) = engine.generate(requests([prompt], n=3, **sampling))
    (alone,) = engine.generate(requests([prompt], **sampling))
    check(several, prompt, model.logits(prompt).log_softmax(-1), 0)
    assert several.prompt_logprobs == alone.prompt_logprobs
    (request,) = requests([prompt], max_tokens=6, prompt_logprobs=0)
    engine.add("k", request, generated=model.greedy(prompt)[:6])
    done: list[Completion] = []
    while engine.has_unfinished():
        done += engine.step()
    assert done[0].token_ids == model.greedy(prompt)[:6]
    check(done[0], prompt, model.logits(prompt).log_softmax(-1), 0)


@pytest.mark.parametrize(
    "much",
    [
        {"logprobs": 4, "max_tokens": 21},
        {"logprobs": 0, "n": 6, "max_tokens": 20, "temperature": 1.0},
        {"prompt_logprobs": 20, "max_tokens": 1},
    ],
)
def test_more_log_probabilities_than_a_result_can_hold_are_refused(
    monkeypatch: pytest.MonkeyPatch, much: dict[str, Any]
) -> None:
    engine = tiny_model("llama").engine()
    monkeypatch.setattr("engine.sampling.logprobs.MOST", 100)
    prompt = [5] * 10
    (refused,) = requests([prompt], **much)
    with pytest.raises(RequestTooLargeError, match="limit is 100"):
        engine.add("much", refused)
    for fine in ({"logprobs": 4, "max_tokens": 20}, {"n": 6, "max_tokens": 20, "temperature": 1.0}):
        (completion,) = engine.generate(requests([prompt], **fine))
        assert completion.error is None
