"""Guides: a text that was written before is followed as far as rounding may have led to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.demo_model import DEMO_MODEL_PATH
from engine.engine import Engine
from engine.requests.completion import Completion
from engine.requests.guide import Guide
from engine.sampling.logits import SamplingRow
from engine.sampling.sampler import choose_tokens, margins_of
from queue_api.wire.schemas import GenerationRequest, SamplingParams

REQUEST = GenerationRequest(
    id="a",
    prompt="Write a short story with the words key, cave and wolf.",
    sampling=SamplingParams(max_tokens=24),
)
FORK = 6
SECOND = 1
"""Rank of the token taken there."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine.load(EngineConfig(model=str(DEMO_MODEL_PATH), devices=("cpu", "cpu")))
    yield engine
    engine.close()


def run(engine: Engine, **given: Any) -> Completion:
    engine.add("a", REQUEST, **given)
    done: list[Completion] = []
    while not done:
        done += engine.step()
    return done[0]


@pytest.mark.parametrize("knows_tokens", [True, False], ids=["tokens", "text"])
def test_a_fork_is_followed_within_its_bound_alone(engine: Engine, knows_tokens: bool) -> None:
    own = run(engine)
    prompt = engine.tokenizer.encode(REQUEST)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL_PATH)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + own.token_ids[:FORK]])).logits[0, -1]
    best, other = logits.topk(2).indices.tolist()
    assert best == own.token_ids[FORK]
    margin = float(logits[best] - logits[other])
    written = run(engine, generated=[*own.token_ids[:FORK], other])
    assert written.text != own.text

    def guide(text: str, bound: float) -> Guide:
        ids = written.token_ids if knows_tokens else None
        ended = written.finish_reason == "stop"
        return Guide(engine.tokenizer, text, ids, ended=ended, bound=bound)

    led = guide(written.text, margin + 0.01)
    assert run(engine, guides=[led]).text == written.text
    assert [(fork.place, fork.chosen, fork.written) for fork in led.forks] == [(FORK, best, other)]
    assert led.forks[0].margin == pytest.approx(margin, abs=1e-3)
    assert not led.is_lost
    lost = guide(written.text, margin - 0.01)
    assert run(engine, guides=[lost]).text == own.text
    assert lost.is_lost
    assert lost.forks[-1].margin == pytest.approx(margin, abs=1e-3)


def test_a_text_of_nobodys_is_lost(engine: Engine) -> None:
    own = run(engine)
    guide = Guide(engine.tokenizer, own.text + " §§", ended=True, bound=0.25)
    assert run(engine, guides=[guide]).text != own.text + " §§"
    guide = Guide(engine.tokenizer, own.text[:9], ended=True, bound=0.001)
    assert run(engine, guides=[guide]).text == own.text
    assert guide.is_lost


def test_a_draw_near_a_border_may_be_the_token_behind_many_that_are_hardly_ever_drawn(
    engine: Engine,
) -> None:
    one, other, bound = 10, 300, 0.1
    logits = torch.full((400,), -12.0)
    logits[one] = logits[other] = 0.0
    sampling, tokens, found = SamplingParams(temperature=1.0), np.zeros(1, dtype=np.int64), 0
    for seed in range(1000):
        row = SamplingRow(tokens, 1, sampling, seed, sample=0, change=None, grammar=None)
        (chosen,) = choose_tokens(logits[None], [row])
        if chosen == one and margins_of(logits, row)[other] <= bound:
            guide = Guide(engine.tokenizer, "", [other], ended=True, bound=bound)
            assert guide.choose(logits, row, chosen) == other
            assert not guide.is_lost
            found += 1
    assert found


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_no_error_below_a_tokens_margin_makes_it_the_chosen(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    sampling = SamplingParams(temperature=temperature)
    changed = 0
    for place in range(200):
        tokens = np.arange(place + 1, dtype=np.int64)
        row = SamplingRow(tokens, 1, sampling, seed=9, sample=0, change=None, grammar=None)
        logits = 2 * torch.randn(50, generator=generator)
        margins = margins_of(logits, row)
        (chosen,) = choose_tokens(logits[None], [row])
        assert margins[chosen] == 0
        difference = 0.4
        noise = (torch.rand(50, generator=generator) - 0.5) * difference
        (now,) = choose_tokens((logits + noise)[None], [row])
        assert margins[now] <= difference + 1e-6
        changed += now != chosen
    assert changed > 5
