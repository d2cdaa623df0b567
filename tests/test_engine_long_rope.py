"""Positions that follow from a text's length: as `generate` has them, beside whatever else runs."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kits.engine_models import SMALL, VOCAB, TinyModel, make_model, requests
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.engine import Engine
from engine.models.long_rope import LongRope
from queue_api.wire.errors import UnsupportedModelError

BORDER = 32
NEW_TOKENS = 20
LENGTHS = (1, 5, 20, 28, BORDER - 1, BORDER, BORDER + 1, 48, 60)
"""Of prompts: below the border, crossing while decoding, at the border, above it."""
_LIMIT = {"original_max_position_embeddings": BORDER}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.2],
    "long_factor": [2.0, 4.0, 8.0, 3.0],
    **_LIMIT,
}
_SIZES = {**SMALL, "num_hidden_layers": 4}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_BY_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": _LONG,
}

MODELS: dict[str, Callable[[], Any]] = {
    "phi3": lambda: transformers.Phi3Config(**_SIZES, **_LIMIT, rope_parameters=_LONG),
    "phi3 with a window": lambda: transformers.Phi3Config(
        **_SIZES, **_LIMIT, rope_parameters=_LONG, sliding_window=9
    ),
    "phimoe": lambda: transformers.PhimoeConfig(
        **_SIZES,
        **_LIMIT,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={**_LONG, "short_mscale": 1.1, "long_mscale": 1.2},
    ),
    # These keep what the short factors gave when a text grows past the border.
    "minicpm3": lambda: transformers.MiniCPM3Config(**{**_SIZES, **_LATENT}, rope_parameters=_LONG),
    "llama": lambda: transformers.LlamaConfig(**_SIZES, rope_parameters=_LONG),
    "one of two layer types": lambda: transformers.Gemma3TextConfig(
        **_SIZES,
        sliding_window=9,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters=_BY_TYPE,
    ),
    # Never longer than what its frequencies are for, so they stay.
    "dynamic": lambda: transformers.LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    ),
}
ENGINES: dict[str, dict[str, Any]] = {
    "at once": {},
    "chunks": {"max_batch_tokens": 11, "max_num_seqs": 4},
    "uneven stages": {
        "devices": ("cpu",) * 2,
        "partition": "custom",
        "layer_bounds": (1,),
        "max_batch_tokens": 16,
        "max_num_seqs": 8,
    },
    "stages in threads": {"devices": ("cpu",) * 2, "pipeline": "threads", "max_num_seqs": 4},
    "few slots": {"kv_cache_tokens": 112, "max_num_seqs": 6, "max_batch_tokens": 20},
    "without a cache": {"use_cache": False},
}


@functools.cache
def model(name: str) -> TinyModel:
    return make_model(MODELS[name](), Path(tempfile.mkdtemp(prefix="batchmill-tests-")))


@functools.cache
def engine(name: str, how: str) -> Engine:
    return model(name).engine(**ENGINES[how])


def prompts() -> list[list[int]]:
    """Two of each length; the second of a length begins as all the others of its kind do."""
    generator = torch.Generator().manual_seed(7)
    alone = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    return [*alone, *([*alone[-1][: n - 1], 9] for n in LENGTHS)]


PROMPTS = prompts()


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_texts_around_the_border_match_generate(name: str, how: str) -> None:
    tested = engine(name, how)
    assert {stage.mode for stage in tested.stages} == {"packed"}
    completions = tested.generate(requests(PROMPTS, max_tokens=NEW_TOKENS))
    expected = [model(name).greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert [completion.token_ids for completion in completions] == expected


@pytest.mark.parametrize("name", ["phi3", "llama"])
def test_single_sequences_match_generate_in_chunks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can't be packed is rotated by the length of its text, too."""

    def refuse(_: object) -> None:
        raise UnsupportedModelError("not packed, for the test")

    monkeypatch.setattr("engine.stages.loading.ModeChoice._check_packable", refuse)
    tested = model(name).engine(max_batch_tokens=11, max_num_seqs=4)
    assert [stage.mode for stage in tested.stages] == ["single"]
    completions = tested.generate(requests(PROMPTS, max_tokens=NEW_TOKENS))
    expected = [model(name).greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert [completion.token_ids for completion in completions] == expected


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, len(PROMPTS) - 1),
        st.integers(0, NEW_TOKENS - 1),  # tokens that it is resumed with
        st.integers(0, 4),  # rounds until the next arrives
    ),
    min_size=1,
    max_size=14,
)


@pytest.mark.parametrize(
    ("name", "how"),
    [("phi3", "few slots"), ("phimoe", "uneven stages"), ("llama", "few slots")],
)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(arrivals=ARRIVALS)
def test_resumed_and_preempted_texts_match_generate(name: str, how: str, arrivals: Any) -> None:
    tested = engine(name, how)
    done: dict[str, list[int]] = {}
    expected: dict[str, list[int]] = {}
    for number, (index, num_resumed, rounds) in enumerate(arrivals):
        whole = model(name).greedy(PROMPTS[index], NEW_TOKENS)
        request = requests([PROMPTS[index]], max_tokens=NEW_TOKENS)[0]
        tested.add(f"{number}", request, generated=whole[: min(num_resumed, len(whole) - 1)])
        expected[f"{number}"] = whole
        for _ in range(rounds):
            done |= {completion.key: completion.token_ids for completion in tested.step()}
    while tested.has_unfinished():
        done |= {completion.key: completion.token_ids for completion in tested.step()}
    assert done == expected


def test_prefixes_are_shared_only_by_texts_rotated_alike() -> None:
    tested = model("phi3").engine(max_num_seqs=1)
    beginning = PROMPTS[-1][:16]
    given = [
        [*beginning, 7, 8],  # short
        beginning + list(range(100, 130)),  # long from its first token on
        [*beginning, 17, 18],
        beginning + list(range(140, 170)),
    ]
    cached = []
    for prompt in given:
        (completion,) = tested.generate(requests([prompt], max_tokens=4))
        assert completion.token_ids == model("phi3").greedy(prompt, 4)
        cached.append(tested.metrics.cached_prompt_tokens)
    assert cached == [0, 0, 16, 32]


def test_prompt_logprobs_of_a_long_prompt_in_chunks_are_those_of_the_whole() -> None:
    prompt = PROMPTS[LENGTHS.index(48)]
    request = requests([prompt], max_tokens=2, prompt_logprobs=0)
    (completion,) = model("phi3").engine(max_batch_tokens=11, max_num_seqs=4).generate(request)
    assert completion.prompt_logprobs is not None
    found = [chosen.logprob for chosen in completion.prompt_logprobs if chosen is not None]
    whole = model("phi3").logits(prompt).log_softmax(-1)
    expected = [float(whole[i, token]) for i, token in enumerate(prompt[1:])]
    assert found == pytest.approx(expected, abs=1e-3)


def test_layers_with_different_borders_are_refused(tmp_path: Path) -> None:
    other = {**_LONG, "original_max_position_embeddings": 64}
    by_type = {"sliding_attention": other, "full_attention": _LONG}
    config = transformers.Gemma3TextConfig(
        **_SIZES,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters=by_type,
    )
    with pytest.raises(UnsupportedModelError, match=r"\[32, 64\]"):
        make_model(config, tmp_path).engine()


class _ByLongest(nn.Module):
    """Halves all angles once a position in the forward passes 50: as some models' own code does."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self._own = own

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        far = bool(position_ids.max() > 50)
        return self._own(x, position_ids.float() / 2 if far else position_ids)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_an_unknown_dependence_on_the_longest_position_is_refused(
    num_stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(transformers.LlamaConfig(**_SIZES), tmp_path)
    folder.engine(devices=("cpu",) * num_stages)
    original = LlamaRotaryEmbedding
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.LlamaRotaryEmbedding",
        lambda *args, **kwargs: _ByLongest(original(*args, **kwargs)),
    )
    with pytest.raises(UnsupportedModelError, match="length of the whole sequence"):
        folder.engine(devices=("cpu",) * num_stages)
    folder.engine(devices=("cpu",) * num_stages, max_model_len=50)


@pytest.mark.parametrize(
    ("name", "recomputes"), [("phi3", True), ("phimoe", True), ("llama", False)]
)
def test_what_generate_does_at_the_border_is_asked_of_the_model(
    name: str, recomputes: bool
) -> None:
    assert LongRope.of(model(name).reference) == LongRope(BORDER, recomputes)


def test_a_layer_that_counts_positions_by_itself_runs_singly_where_it_shows(tmp_path: Path) -> None:
    """Llama 4 scales queries by a count of its cache, from `floor_scale` tokens on."""
    config = transformers.Llama4TextConfig(
        **_SIZES,
        attention_chunk_size=12,
        intermediate_size_mlp=48,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        floor_scale=40,
    )
    llama4 = make_model(config, tmp_path)
    tested = llama4.engine(max_batch_tokens=16, max_num_seqs=4)
    assert [stage.mode for stage in tested.stages] == ["single"]
    completions = tested.generate(requests(PROMPTS, max_tokens=NEW_TOKENS))
    expected = [llama4.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert [completion.token_ids for completion in completions] == expected
    assert [stage.mode for stage in llama4.engine(max_model_len=39).stages] == ["packed"]
