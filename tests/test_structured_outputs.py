"""Structured output: real xgrammar on the demo model, judged by jsonschema and `re`."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from kits.engine_models import requests, tiny_model
from kits.worker_kit import until

from engine.engine import Engine
from engine.requests.completion import Completion
from queue_api.wire.errors import InvalidRequestError, UnsupportedRequestError
from queue_api.wire.schemas import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    StructuredOutputs,
)
from queue_api.wire.structured_outputs import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH

MODEL = tiny_model("demo")
PROMPTS = ["Tell me a story.", "What is 2 + 3?", "Who are you?", "Name a colour."]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    pytest.importorskip("xgrammar", reason="needs the extra 'structured'")
    return MODEL.engine(max_num_seqs=8)


def generate(engine: Engine, outputs: dict[str, Any], **sampling: Any) -> list[Completion]:
    sampling = {"temperature": 1.0, "max_tokens": 120, **sampling}
    return engine.generate(requests(PROMPTS, structured_outputs=outputs, **sampling))


def run(engine: Engine) -> dict[str, Completion]:
    done: dict[str, Completion] = {}
    while engine.has_unfinished():
        done.update((completion.key, completion) for completion in engine.step())
    return done


@pytest.mark.parametrize("seed", range(3))
def test_json_obeys_its_schema(engine: Engine, seed: int) -> None:
    done = generate(engine, {"json": PERSON}, seed=seed, temperature=1.3)
    for completion in done:
        assert completion.structured_output == "valid", completion.text
        assert completion.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(completion.text), PERSON)


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": r"[a-c]{3}-\d+(\.\d)?"}, r"[a-c]{3}-\d+(\.\d)?"),
        ({"choice": ['a "b"', "c\\d\n", "é|x", "(f"]}, r'a "b"|c\\d\n|é\|x|\(f'),
        ({"grammar": 'root ::= "<" item+ ">"\nitem ::= "x" | "yy"'}, r"<(x|yy)+>"),
    ],
    ids=["regex", "choice", "grammar"],
)
def test_the_whole_text_matches(engine: Engine, outputs: dict[str, Any], pattern: str) -> None:
    for completion in generate(engine, outputs, n=4):
        for sample in completion.samples:
            assert sample.structured_output == "valid", sample.text
            assert re.fullmatch(pattern, sample.text)


def test_json_object_is_any_object(engine: Engine) -> None:
    done = [sample for c in generate(engine, {"json_object": True}, n=6) for sample in c.samples]
    valid = [sample for sample in done if sample.structured_output == "valid"]
    assert valid
    assert all(isinstance(json.loads(sample.text), dict) for sample in valid)
    cut = [sample for sample in done if sample not in valid]
    assert all(s.finish_reason is FinishReason.LENGTH for s in cut)


def test_a_text_that_is_cut_says_so(engine: Engine) -> None:
    for completion in generate(engine, {"json": PERSON}, max_tokens=5):
        assert (completion.finish_reason, completion.structured_output) == ("length", "truncated")
    for completion in generate(engine, {"regex": "aaa;bbb"}, stop=[";"]):
        assert (completion.text, completion.structured_output) == ("aaa", "truncated")


def test_what_a_grammar_leaves_out_is_found_in_the_text(engine: Engine) -> None:
    twice = {"type": "array", "items": {"enum": [1]}, "minItems": 2, "maxItems": 2}
    assert {c.structured_output for c in generate(engine, {"json": twice})} == {"valid"}
    unique = {**twice, "uniqueItems": True}
    for completion in generate(engine, {"json": unique}):
        assert completion.structured_output == "invalid"
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(completion.text), unique)


STRINGS = {"type": "string"}
PATTERNS: dict[str, dict[str, Any]] = {
    "look-ahead": {**STRINGS, "pattern": "^(?=.*c)[a-c]{1,3}$"},
    "look-behind": {**STRINGS, "pattern": "^[a-c]{1,3}(?<!a)$"},
    "beside an enum": {**STRINGS, "enum": ["aa", "bb"], "pattern": "^a+$"},
    "beside a format": {**STRINGS, "format": "ipv4", "pattern": "^1"},
    "two of allOf": {"allOf": [{**STRINGS, "pattern": "^[ab]{2}$"}, {"pattern": "^a"}]},
    "not": {**STRINGS, "maxLength": 3, "not": {"pattern": "[a-e]"}},
    "without a type": {"enum": ["a", "b", 1], "pattern": "^a$"},
    "beside a reference": {
        "$ref": "#/$defs/x",
        "pattern": "^b",
        "$defs": {"x": {"enum": ["a", "b"]}},
    },
    "flags": {**STRINGS, "pattern": "^(?:a|b){1,3}$", "not": {"pattern": "(?i)A"}},
    "of properties": {
        "type": "object",
        "properties": {"aa": {"enum": [1, 20]}},
        "required": ["aa"],
        "patternProperties": {"^a+$": {"maximum": 9}},
        "additionalProperties": False,
    },
    "beside lengths": {**STRINGS, "pattern": "^[a-z]+-?[0-9]*$", "minLength": 2, "maxLength": 4},
}


@pytest.mark.parametrize("what", PATTERNS)
def test_no_pattern_is_taken_for_obeyed_that_isnt(engine: Engine, what: str) -> None:
    schema = PATTERNS[what]
    found = set()
    for completion in generate(engine, {"json": schema}, n=4, temperature=1.5):
        if completion.error is not None:
            assert "Lookbehind" in str(completion.error)
            found.add(False)
        for sample in completion.samples:
            if sample.structured_output != "truncated":
                right = jsonschema.Draft202012Validator(schema).is_valid(json.loads(sample.text))
                assert (sample.structured_output == "valid") == right, sample.text
                found.add(right)
    assert found


def test_a_pattern_ends_where_the_length_beside_it_does(engine: Engine) -> None:
    schema = {**STRINGS, "pattern": r"^[a-z+*\]]+(b*)$", "maxLength": 6}
    for completion in generate(engine, {"json": schema}, n=4):
        for sample in completion.samples:
            assert sample.finish_reason is FinishReason.STOP
            assert len(json.loads(sample.text)) <= 12


def test_a_pattern_that_never_ends_costs_its_own_text_only(engine: Engine) -> None:
    endless = {"allOf": [{**STRINGS, "pattern": "^a{40}$"}, {"pattern": "^(a+)+c$"}]}
    for _ in range(2):
        done = generate(engine, {"json": endless})
        assert {completion.structured_output for completion in done} == {"invalid"}
    fine = {**STRINGS, "pattern": "^(?=a)[ab]{2}$"}
    found = {c.structured_output for c in generate(engine, {"json": fine}, n=8)}
    assert found <= {"valid", "invalid"}


def test_other_requests_in_the_batch_are_as_ever(engine: Engine) -> None:
    plain = requests(PROMPTS, max_tokens=20)
    formed = requests(PROMPTS, max_tokens=20, structured_outputs={"regex": "[xyz]+"})
    expected = [completion.token_ids for completion in engine.generate(plain)]
    done = engine.generate([*plain, *formed])
    assert [completion.token_ids for completion in done[:4]] == expected
    assert all(completion.structured_output is None for completion in done[:4])
    assert all(re.fullmatch("[xyz]+", completion.text) for completion in done[4:])


def test_same_text_in_any_batch_and_partition(engine: Engine) -> None:
    expected = [c.token_ids for c in generate(engine, {"json": PERSON}, seed=5)]
    for config in (
        {"max_num_seqs": 1},
        {"devices": ("cpu",) * 2, "max_num_seqs": 4, "max_batch_tokens": 7},
    ):
        other = MODEL.engine(**config)
        assert [c.token_ids for c in generate(other, {"json": PERSON}, seed=5)] == expected
        other.close()


def test_a_successor_goes_on_within_the_grammar(engine: Engine) -> None:
    sampling = {"structured_outputs": {"json": PERSON}, "temperature": 1.0, "max_tokens": 120}
    (request,) = requests(PROMPTS[:1], **sampling)
    (expected,) = engine.generate([request])
    for kept in (1, len(expected.token_ids) // 2, len(expected.token_ids)):
        engine.add("k", request, generated=expected.token_ids[:kept], seed_key="0")
        done = run(engine)["k"]
        assert (done.token_ids, done.structured_output) == (expected.token_ids, "valid")
    engine.add(
        "k", request, generated=[5, 5, 5], seed_key="0"
    )  # refused by the grammar: begun anew
    assert run(engine)["k"].token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"regex": "((("}, "parenthesis"),
        ({"json": {"type": "foo"}}, r"at \['type'\].*foo"),
        ({"json": {"$ref": "#/$defs/none"}}, "none"),
        ({"grammar": "other ::= x"}, "root"),
        ({"regex": "a(?!b)[a-c]"}, "Lookahead"),
        ({"json": {"type": "string", "pattern": "(?<x>a)"}}, "is not a 'regex'"),
    ],
)
def test_a_wrong_grammar_fails_its_request_alone(
    engine: Engine, outputs: dict[str, Any], message: str
) -> None:
    right, wrong = requests(PROMPTS[:2]), requests(PROMPTS[2:], structured_outputs=outputs)
    expected = engine.generate(right)
    done = engine.generate([*right, *wrong])
    assert [c.token_ids for c in done[:2]] == [c.token_ids for c in expected]
    for completion in done[2:]:
        assert completion.finish_reason is FinishReason.ERROR
        assert isinstance(completion.error, InvalidRequestError)
        assert re.search(message, str(completion.error))
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def slow(number: int) -> dict[str, Any]:
    """Takes minutes to compile."""
    names = {f"{number}-{i}": {"type": "string"} for i in range(2000)}
    return {"json": {"type": "object", "properties": names}}


def test_grammars_that_never_end_keep_no_others_from_being_compiled() -> None:
    pytest.importorskip("xgrammar", reason="needs the extra 'structured'")
    engine = MODEL.engine(max_num_seqs=8)
    engine._grammars.compile_limit_s = 3.0
    before = threading.active_count()
    for number in range(3):
        (request,) = requests(PROMPTS[:1], structured_outputs=slow(number))
        engine.add(f"slow{number}", request)
    for number in range(120):
        (request,) = requests(PROMPTS[:1], structured_outputs={"regex": f"[ab]{{3}}{number}"})
        engine.add(str(number), request)
    assert threading.active_count() <= before + 2
    done = run(engine)
    engine.close()
    for number in range(3):
        assert "longer than 3 s" in str(done[f"slow{number}"].error)
    for number in range(120):
        completion = done[str(number)]
        assert completion.error is None
        assert re.fullmatch(f"[ab]{{3}}{number}", completion.text)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_compiles_ends_with_its_engine() -> None:
    pytest.importorskip("xgrammar", reason="needs the extra 'structured'")
    before = children_of(os.getpid())
    engine = MODEL.engine()
    (request,) = requests(PROMPTS[:1], structured_outputs=slow(9))
    engine.add("slow", request)
    (lane,) = engine._grammars._lanes
    until(lambda: lane.busy_since < float("inf"))  # amid it
    (process,) = children_of(os.getpid()) - before
    engine.close()
    until(lambda: process not in children_of(os.getpid()), patience_s=20)


def children_of(pid: int) -> set[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for path in lists for child in path.read_text().split()}


def test_a_grammar_that_takes_too_long_doesnt_hold_up_others() -> None:
    pytest.importorskip("xgrammar", reason="needs the extra 'structured'")
    engine = MODEL.engine()
    engine._grammars.compile_limit_s = 0.0
    names = {f"name{i}": {"type": "string"} for i in range(300)}
    slow = {"json": {"type": "object", "properties": names}}
    (request,) = requests(PROMPTS[:1], structured_outputs=slow)
    for key, other in zip("abc", requests(PROMPTS[1:], max_tokens=5), strict=True):
        engine.add(key, other)
    engine.add("slow", request)
    done = run(engine)
    assert "too" in str(done["slow"].error) or "longer than 0 s" in str(done["slow"].error)
    assert all(done[key].error is None for key in "abc")


def test_cancelled_before_its_grammar_is_there(engine: Engine) -> None:
    (request,) = requests(PROMPTS[:1], structured_outputs={"regex": "never[s]een"})
    engine.add("k", request)
    assert engine.cancel("k")
    assert run(engine) == {}
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def test_without_xgrammar_that_request_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MODEL.engine()
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(UnsupportedRequestError, match=r"xgrammar.*batchmill\[structured\]"):
        generate(engine, {"json_object": True})
    assert not engine.has_unfinished()


def parsed(**sampling: Any) -> SamplingParams:
    data = {"id": "x", "prompt": "a", "sampling": sampling}
    return GenerationRequest.parse(data).sampling


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"structured_outputs": {}}, "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
        ({"structured_outputs": {"json": "{"}}, "isn't JSON"),
        ({"structured_outputs": {"json": deep(MAX_SCHEMA_DEPTH)}}, "nested deeper"),
        ({"structured_outputs": {"json": {"const": "x" * MAX_SCHEMA_BYTES}}}, "limit is"),
        ({"structured_outputs": {"json": {"$ref": "http://a/b"}}}, "only references within"),
        ({"structured_outputs": {"choice": []}}, "empty"),
        ({"structured_outputs": {"json_object": True}, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "xml"}}, "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "schema"),
    ],
)
def test_what_is_wrong_is_said_before_it_is_sent(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parsed(**sampling)


def test_openais_name_means_the_same_and_both_survive_the_wire() -> None:
    wrapped = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    params = parsed(response_format=wrapped)
    assert params.structured_outputs == StructuredOutputs(json=PERSON)
    assert parsed(structured_outputs={"json": json.dumps(PERSON)}) == params
    assert parsed(response_format={"type": "text"}).structured_outputs is None
    assert SamplingParams.model_validate_json(params.model_dump_json(exclude_unset=True)) == params
