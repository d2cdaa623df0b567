"""The last layer leaves out what nobody reads, and nothing else."""

from __future__ import annotations

import inspect
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kits.engine_models import requests, tiny_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from engine.attention.hook import AttentionCall, attend_packed, attending
from engine.attention.kv_pool import KVPool, KVShape
from engine.attention.masks import MaskRule
from engine.attention.sdpa import SdpaBackend
from engine.batch import ForwardBatch, Segment
from queue_api.wire.errors import UnsupportedModelError

PROMPTS = [list(range(5, 45)), [9, 8, 7], list(range(60, 90)), [4]]


def _rows_of_layers(engine: Any, forward: Any) -> list[int]:
    """The tokens that each layer's MLP computes during `forward`."""
    counts: list[int] = []
    hooks = []
    for stage in engine.stages:
        for layer in stage.model.model.layers:
            index = len(counts)
            counts.append(0)

            def count(_module: object, args: tuple[torch.Tensor], index: int = index) -> None:
                counts[index] += args[0].shape[1]

            hooks.append(layer.mlp.register_forward_pre_hook(count))
    forward()
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("stages", [1, 2, 6])
def test_it_computes_one_token_of_a_prompt(stages: int):
    model = tiny_model("llama")
    engine = model.engine(devices=("cpu",) * stages, max_batch_tokens=24, max_num_seqs=8)
    done: list[Any] = []
    counts = _rows_of_layers(
        engine, lambda: done.extend(engine.generate(requests(PROMPTS, max_tokens=6)))
    )
    assert [completion.token_ids for completion in done] == [model.greedy(p, 6) for p in PROMPTS]
    read = sum(len(prompt) + len(c.token_ids) - 1 for prompt, c in zip(PROMPTS, done, strict=True))
    due = sum(len(completion.token_ids) for completion in done)
    assert counts[:-1] == [read] * (len(counts) - 1)
    # Of a micro-batch in which no token is due it computes one all the same.
    assert due <= counts[-1] <= due + 4 < read
    engine.close()


def test_logits_of_a_prompt_are_computed_where_they_are_wanted():
    model = tiny_model("llama")
    engine = model.engine(prefix_caching=False)
    prompt = PROMPTS[0]
    wanted = requests([prompt], max_tokens=1, prompt_logprobs=0)
    counts = _rows_of_layers(engine, lambda: engine.generate(wanted))
    assert counts[-1] == len(prompt)


def test_the_layer_s_parameters_are_its_own():
    (stage,) = tiny_model("llama").engine().stages
    last, first = stage.model.model.layers[-1], stage.model.model.layers[0]
    assert inspect.signature(last.forward) == inspect.signature(first.forward)


def test_without_a_cache_all_is_computed():
    model = tiny_model("llama")
    engine = model.engine(use_cache=False)
    done = engine.generate(requests(PROMPTS, max_tokens=4))
    assert [completion.token_ids for completion in done] == [model.greedy(p, 4) for p in PROMPTS]


def test_a_layer_that_needs_all_tokens_gets_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The model's classes are others' code: what can't be cut shows when the stage loads."""
    own = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        first = self.self_attn.layer_idx == 0
        if first:
            LlamaDecoderLayer.ones = torch.ones(hidden_states.shape[1], 1)
        return own(self, hidden_states * LlamaDecoderLayer.ones, *args, **kwargs)

    model = tiny_model("llama")
    expected = [model.greedy(prompt, 6) for prompt in PROMPTS]
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    monkeypatch.setattr(LlamaDecoderLayer, "ones", None, raising=False)
    with caplog.at_level(logging.INFO, "engine.stages.loading"):
        engine = model.engine()
    assert "the last layer computes all tokens" in caplog.text
    assert engine.stages[0].mode == "packed"
    done = engine.generate(requests(PROMPTS, max_tokens=6))
    assert [completion.token_ids for completion in done] == expected


def test_keys_of_other_tokens_than_the_batch_s_are_refused():
    """As a last layer has them that takes an earlier layer's: its slots are too few for them."""
    whole = ForwardBatch(
        segments=[Segment(0, 6, 0, 0, 0)],
        token_ids=torch.arange(6),
        positions=torch.arange(6),
        slots=torch.arange(6),
        logit_rows=torch.tensor([5]),
    )
    cpu = torch.device("cpu")
    pool = KVPool([KVShape(2, 8, 8)], 6, device=cpu, dtype=torch.float32)
    call = AttentionCall(whole, pool, 0, SdpaBackend()).of_tokens(torch.tensor([5]))
    query, keys = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 6, 8)
    layer = SimpleNamespace(layer_idx=0)
    with attending(call), pytest.raises(UnsupportedModelError, match="keys of other tokens"):
        attend_packed(layer, query, keys, keys, MaskRule())
