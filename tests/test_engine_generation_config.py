"""Greedy text beside generate(do_sample=False) of models whose generation config asks for more."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kits.engine_models import (
    CONFIGS,
    EOS,
    TinyModel,
    load_reference,
    make_model,
    mixed_prompts,
    tiny_model,
    tiny_tokenizer,
)

from engine.config import EngineConfig
from engine.engine import Engine
from queue_api.wire.errors import UnsupportedModelError, UnsupportedRequestError
from queue_api.wire.schemas import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    SamplingParams,
)
from workers.running.outcomes import Outcome

PROMPTS = mixed_prompts(count=4, longest=30)
# one whose text ends early
PROMPTS += [next([t, 7] for t in range(3, 259) if EOS in tiny_model("llama").greedy([t, 7])[3:18])]
FIRST = [tiny_model("llama").greedy(prompt)[:3] for prompt in PROMPTS]
"""What the model would write without any of it."""
CASES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "encoder_no_repeat_ngram_size": 1,
    "suppress_tokens": [new[0] for new in FIRST],
    "begin_suppress_tokens": [new[0] for new in FIRST],
    "min_new_tokens": 20,
    "min_length": 30,
    "bad_words_ids": [[new[0]] for new in FIRST[:2]] + [FIRST[3][:2], FIRST[4][:3]],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": EOS,
    "exponential_decay_length_penalty": [2, 1.5],
    "sequence_bias": [[[FIRST[0][0]], -50.0], [FIRST[1][:2], -50.0], [[9], 3.0]],
    "remove_invalid_values": True,
    "renormalize_logits": True,
}


def model_with(folder: Path, file: str = "generation_config.json", **fields: Any) -> TinyModel:
    """The tiny Llama with these fields in its generation config, or another file of it."""
    make_model(CONFIGS["llama"](), folder)
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return TinyModel(folder, load_reference(folder))


def request(prompt: list[int], number: int = 0, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(**{"max_tokens": 24, **sampling})
    return GenerationRequest(id=str(number), prompt=prompt, sampling=params)


def texts(engine: Engine, **sampling: Any) -> list[list[int]]:
    asked = [request(prompt, i, **sampling) for i, prompt in enumerate(PROMPTS)]
    return [completion.token_ids for completion in engine.generate(asked)]


def expected(model: TinyModel, **generate: Any) -> list[list[int]]:
    """transformers' own, each alone."""
    new = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        kwargs: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, **generate}
        out = model.reference.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
        new.append(out[0, len(prompt) :].tolist())
    return new


@pytest.mark.parametrize(
    ("file", "name"),
    [("generation_config.json", name) for name in CASES]
    + [("config.json", name) for name in ("repetition_penalty", "suppress_tokens")],
)
def test_each_field_is_applied_as_generate_does(tmp_path: Path, name: str, file: str) -> None:
    model = model_with(tmp_path, file, **{name: CASES[name]})
    want = expected(model)
    engine = model.engine(devices=("cpu", "cpu"), max_batch_tokens=16, max_num_seqs=4)
    asked = [request(prompt, i) for i, prompt in enumerate(PROMPTS)]
    completions = engine.generate(asked)
    assert [c.token_ids for c in completions] == want
    assert {c.applied_defaults for c in completions} == {(name,)}
    if name not in ("remove_invalid_values", "renormalize_logits"):
        assert want != expected(tiny_model("llama"))  # it does something
    plain = texts(engine, generation_defaults="none")
    assert plain == expected(tiny_model("llama"))


def test_a_result_names_what_was_applied(tmp_path: Path) -> None:
    engine = model_with(tmp_path, repetition_penalty=1.3, begin_suppress_tokens=[7]).engine()
    asked = [request(PROMPTS[0]), request(PROMPTS[0], 1, generation_defaults="none")]
    results = [
        GenerationResult.model_validate(
            Outcome(None, 0, str(i), completion, None, asked[i], 0.0, {}).fields()
        )
        for i, completion in enumerate(engine.generate(asked))
    ]
    assert results[0].applied_defaults == ["repetition_penalty", "begin_suppress_tokens"]
    assert results[1].applied_defaults is None


@functools.cache
def _combined(names: tuple[str, ...], folder: Path) -> TinyModel:
    return model_with(folder, **{name: CASES[name] for name in names})


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_fields_together_in_any_batch_and_partition(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(CASES)), min_size=1, max_size=5, unique=True))
    model = _combined(tuple(sorted(names)), tmp_path_factory.mktemp("model"))
    want = expected(model)
    stages = data.draw(st.integers(1, 3))
    engine = model.engine(
        devices=("cpu",) * stages,
        max_num_seqs=data.draw(st.integers(1, 5)),
        max_batch_tokens=data.draw(st.integers(5, 40)),
        kv_cache_tokens=data.draw(st.sampled_from([64, 128, None])),
    )
    begun = data.draw(st.lists(st.integers(0, 6), min_size=5, max_size=5))
    for i, prompt in enumerate(PROMPTS):
        engine.add(str(i), request(prompt, i), generated=want[i][: min(begun[i], len(want[i]) - 1)])
    done = {}
    while engine.has_unfinished():
        done.update((completion.key, completion.token_ids) for completion in engine.step())
    assert [done[str(i)] for i in range(len(PROMPTS))] == want


@pytest.mark.parametrize(
    ("field", "value", "ours"),
    [
        ("repetition_penalty", 1.0, {"repetition_penalty": 1.0}),
        ("repetition_penalty", 1.7, {"repetition_penalty": 1.7}),
        ("min_new_tokens", 0, {"min_tokens": 0}),
        ("bad_words_ids", None, {"bad_words": []}),
    ],
)
def test_a_requests_own_value_goes_before_the_models(
    tmp_path: Path, field: str, value: object, ours: dict[str, Any]
) -> None:
    """In the order in which transformers applies it among the others."""
    fields = {name: CASES[name] for name in ("exponential_decay_length_penalty", "sequence_bias")}
    model = model_with(tmp_path, **fields, **{field: CASES[field]})
    without = model_with(tmp_path / "other", **fields)
    want = expected(without, **({} if value is None else {field: value}))
    engine = model.engine()
    # as it travels
    asked = [
        GenerationRequest.model_validate_json(
            request(prompt, i, **ours).model_dump_json(exclude_unset=True)
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    completions = engine.generate(asked)
    assert [c.token_ids for c in completions] == want
    assert all(field not in c.applied_defaults for c in completions)


def test_sampling_defaults_count_where_they_are_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    model = model_with(tmp_path, **sampling)
    with caplog.at_level(logging.INFO):
        greedy = texts(model.engine())
    assert "temperature=0.8, top_k=20, top_p=0.9 aren't applied" in caplog.text
    assert greedy == expected(tiny_model("llama"))
    given = texts(model.engine(), temperature=0.8, top_k=20, top_p=0.9)
    assert given != greedy
    assert texts(model.engine(generation_defaults="all")) == given
    assert texts(model.engine(), generation_defaults="all") == given
    asked = [request(p, i, temperature=0, top_k=3) for i, p in enumerate(PROMPTS)]
    own = model.engine(generation_defaults="all").generate(asked)
    assert [c.token_ids for c in own] == greedy
    assert {c.applied_defaults for c in own} == {("top_p",)}


def test_stop_strings_of_the_model_end_texts(tmp_path: Path) -> None:
    whole = tiny_tokenizer().decode(tiny_model("llama").greedy(PROMPTS[0]))
    pairs = (whole[i : i + 2] for i in range(len(whole)))
    stop = next(pair for pair in pairs if pair.isascii())  # not a part of a character
    engine = model_with(tmp_path, stop_strings=[stop]).engine()
    (ended,) = engine.generate([request(PROMPTS[0])])
    assert (ended.text, ended.finish_reason) == (whole[: whole.index(stop)], FinishReason.STOP)
    assert ended.applied_defaults == ("stop_strings",)
    (own,) = engine.generate([request(PROMPTS[0], stop=["never there"])])
    assert own.token_ids == tiny_model("llama").greedy(PROMPTS[0])


def test_a_stop_string_of_the_model_may_begin_in_the_prompt(tmp_path: Path) -> None:
    """As in `generate`; one of the request's own has to be in the new text."""
    plain = tiny_tokenizer()
    prompts = ([*PROMPTS[0], token] for token in plain.encode("abcdefghijklmnop"))
    prompt = next(p for p in prompts if plain.decode(tiny_model("llama").greedy(p)[:1]).isascii())
    begin = plain.decode(tiny_model("llama").greedy(prompt)[:1])
    stop = plain.decode(prompt)[-1] + begin
    engine = model_with(tmp_path, stop_strings=[stop]).engine()
    ids = torch.tensor([prompt])
    wanted = (
        tiny_model("llama")
        .reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            stop_strings=[stop],
            tokenizer=plain,
        )[0, len(prompt) :]
        .tolist()
    )
    (ended,) = engine.generate([request(prompt)])
    assert (ended.token_ids, ended.text, len(wanted)) == (wanted, "", 1)
    assert ended.finish_reason is FinishReason.STOP
    (kept,) = engine.generate([request(prompt, include_stop_str_in_output=True)])
    assert (kept.token_ids, kept.text) == (wanted, begin)
    (own,) = engine.generate([request(prompt, stop=[stop])])
    assert own.token_ids == tiny_model("llama").greedy(prompt)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 3},
        {"guidance_scale": 1.5},
        {"num_return_sequences": 2, "do_sample": True},
        {"watermarking_config": {"bias": 2.0}},
        {"penalty_alpha": 0.6},
        {"max_time": 3.0},
    ],
)
def test_what_cant_be_applied_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
) -> None:
    model_with(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    engine = Engine.load(EngineConfig(str(tmp_path)))
    name = next(iter(fields))
    (said,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert f"{name}=" in said
    assert "can't be applied" in said
    assert texts(engine) == expected(tiny_model("llama"))
    caplog.clear()
    Engine.load(EngineConfig(str(tmp_path), generation_defaults="none"))
    assert name not in caplog.text


def test_a_usual_generation_config_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usual = {"max_length": 4096, "num_beams": 1, "repetition_penalty": 1.0, "guidance_scale": 1.0}
    engine = model_with(tmp_path, **usual).engine()
    (completion,) = engine.generate([request(PROMPTS[0])])
    assert completion.applied_defaults == ()
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suppress_tokens", ["a"]),
        ("repetition_penalty", "high"),
        ("forced_eos_token_id", 10_000),
        ("bad_words_ids", [[10_000]]),
        ("sequence_bias", [[3, 1.0]]),
        ("no_repeat_ngram_size", -1),
        ("exponential_decay_length_penalty", 3),
        ("stop_strings", [3]),
    ],
)
def test_a_field_that_makes_no_sense_is_named(tmp_path: Path, name: str, value: object) -> None:
    make_model(CONFIGS["llama"](), tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": EOS, name: value}))
    with pytest.raises(UnsupportedModelError, match=f"generation_config.json.*{name}"):
        Engine.load(EngineConfig(str(tmp_path)))
    engine = Engine.load(EngineConfig(str(tmp_path), generation_defaults="none"))
    with pytest.raises(UnsupportedRequestError, match=name):
        engine.add("r", request(PROMPTS[0], generation_defaults="model"))
    assert texts(engine) == expected(tiny_model("llama"))


# ----------------------------------------------------------------------------------- end of text


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": 2,', "", "[]", '{"max_new_tokens": -5}', '{"eos_token_id": "2"}']
)
def test_a_damaged_generation_config_is_named(tmp_path: Path, content: str) -> None:
    make_model(CONFIGS["llama"](), tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=r"generation_config\.json") as caught:
        Engine.load(EngineConfig(str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["</s>", "2", [2, "</s>"], True, 2.0])
def test_an_end_of_text_that_is_no_id_is_refused(tmp_path: Path, value: object) -> None:
    make_model(CONFIGS["llama"](), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UnsupportedModelError, match="eos_token_id"):
        Engine.load(EngineConfig(str(tmp_path)))


def test_two_ends_of_text_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_model(CONFIGS["llama"](), tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<s>"
    tokenizer.save_pretrained(tmp_path)
    engine = Engine.load(EngineConfig(str(tmp_path)))
    assert engine.tokenizer.eos_token_ids == {EOS}
    (said,) = [r.message for r in caplog.records if "end-of-text" in r.message]
    assert "'</s>' (2)" in said
    assert "'<s>' (1)" in said
    caplog.clear()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    Engine.load(EngineConfig(str(tmp_path)))
    assert "end-of-text" not in caplog.text
