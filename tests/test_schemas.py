"""The wire models: what is wrong with a request is said as its author would say it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_api.client.submission import as_request
from queue_api.store.jobs import parse_items, request_from_fields
from queue_api.wire.errors import GenerationFailedError, InvalidRequestError
from queue_api.wire.schemas import ErrorDetail, GenerationRequest, GenerationResult, SamplingParams


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": []}, "'prompt' has no tokens; give at least one"),
        ({"prompt": 3}, "'prompt' is 3: must be a valid string"),
        ({"prompt": [5, -1]}, "'prompt[1]' is -1: must be at least 0"),
        ({"prompt": "x", "stop": 5}, "'stop' is 5: must be a string or a list of strings"),
        (
            {"prompt": "x", "max_tokens": 10**5000},
            "'max_tokens' is a number of more than 4300 digits: must be less than 2147483648",
        ),
        (
            {"prompt": "x", "metadata": {"a": 10**5000}},
            "can't be written as JSON (an integer of more than 4300 digits)",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "has a part of the type 'image_url': of content parts only text is taken",
        ),
        ({}, "give either 'prompt' or 'messages', not both and not neither"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": [{"role": "user"}]}, "'messages[0].content' is missing"),
        ({"messages": [{"role": "user", "content": "x", "x": 1}]}, "unknown field 'messages[0].x'"),
        ({"prompt": "x", "max_tokens": 0}, "'max_tokens' is 0: must be at least 1"),
        ({"prompt": "x", "max_tokens": "5"}, "'max_tokens' is '5': must be a valid integer"),
        ({"prompt": "x", "temperature": -1}, "'temperature' is -1: must be at least 0"),
        ({"prompt": "x", "temperature": float("nan")}, "must be a finite number"),
        ({"prompt": "x", "top_p": 0}, "'top_p' is 0: must be more than 0"),
        ({"prompt": "x", "top_p": 2}, "'top_p' is 2: must be at most 1"),
        ({"prompt": "x", "stop": ["a", ""]}, "'stop[1]' is empty"),
        ({"prompt": "x", "stop": ["a"] * 17}, "must have at most 16 items"),
        ({"prompt": "x", "stop_token_ids": [-1]}, "'stop_token_ids[0]' is -1"),
        ({"prompt": "x", "max_token": 1}, "unknown field 'max_token'"),
        ({"prompt": "x", "max_new_token": 1}, "unknown field 'max_new_token'"),
        ({"prompt": "x", "max_new_tokens": 0}, "'max_tokens' is 0: must be at least 1"),
        (
            {"prompt": "x", "max_new_tokens": 1, "max_tokens": 1},
            "give 'max_tokens' or its other name 'max_new_tokens', not both",
        ),
        ({"prompt": "x", "do_sample": "yes"}, "'do_sample' is 'yes': must be a valid boolean"),
        (
            {"prompt": "x", "do_sample": True, "temperature": 0},
            "'do_sample' is True, but 'temperature' is 0",
        ),
        ({"prompt": "x", "min_p": 1.5}, "'min_p' is 1.5: must be at most 1"),
        (
            {"prompt": "x", "min_tokens": 9, "max_tokens": 8},
            "'min_tokens' is 9: must be at most max_tokens, 8",
        ),
        (
            {"prompt": "x", "repetition_penalty": 0},
            "'repetition_penalty' is 0: must be at least 0.01",
        ),
        ({"prompt": "x", "presence_penalty": 3}, "'presence_penalty' is 3: must be at most 2"),
        ({"prompt": "x", "frequency_penalty": -3}, "'frequency_penalty' is -3: must be at least"),
        ({"prompt": "x", "logit_bias": {"5": 101}}, "'logit_bias[5]' is 101: must be at most 100"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "'logit_bias.a' is 'a': must be a valid integer"),
        ({"prompt": "x", "bad_words": ["a", ""]}, "'bad_words[1]' is empty"),
        ({"prompt": "x", "logprobs": 21}, "'logprobs' is 21: must be at most 20"),
        ({"prompt": "a", "best_of": 2}, "unknown field 'best_of'"),
        ({"prompt": "a", "n": 2}, "'n' is 2: greedy samples are all the same"),
        ({"prompt": "a", "n": 129}, "'n' is 129: must be at most 128"),
        ({"prompt": "x", "id": ""}, "'id' is empty"),
        ({"prompt": "x", "id": "x" * 257}, "must have at most 256 characters"),
        ({"prompt": "x", "sampling": 3}, "'sampling' is 3"),
        ({"prompt": "x", "sampling": {}, "seed": 1}, "flat or in 'sampling', not both"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_limit(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        request_from_fields({"id": "i", **fields})
    told = str(raised.value)
    assert message in told
    assert ";" not in told.replace(message, "")
    assert "constrained" not in told
    assert "list[int]" not in told


def test_all_wrong_fields_are_named_and_long_values_shortened() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        request_from_fields({"id": "i", "prompt": "x", "seed": "9" * 5000, "top_k": -5})
    assert "'seed' is" in str(raised.value)
    assert "'top_k' is -5" in str(raised.value)
    assert len(str(raised.value)) < 300


@given(
    st.builds(
        GenerationRequest,
        id=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
        prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
        | st.lists(st.integers(0, 2**31 - 1), min_size=1),
        messages=st.none(),
        sampling=st.builds(
            SamplingParams,
            max_tokens=st.integers(1, 10**6),
            temperature=st.floats(0, 100),
            top_k=st.integers(-1, 1000),
            top_p=st.floats(0.01, 1),
            seed=st.none() | st.integers(0, 2**63 - 1),
            stop=st.just([]),
            stop_token_ids=st.just([]),
            min_tokens=st.just(0),
            min_p=st.floats(0, 1),
            repetition_penalty=st.floats(0.01, 100),
            presence_penalty=st.floats(-2, 2),
            frequency_penalty=st.floats(-2, 2),
            logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100)),
            bad_words=st.just(["a"]),
            logprobs=st.none() | st.integers(0, 20),
        ),
        metadata=st.dictionaries(st.just("key"), st.integers() | st.none()),
    )
)
def test_a_request_travels_unchanged(request_: GenerationRequest) -> None:
    wire = request_.model_dump_json(exclude_defaults=True)
    assert GenerationRequest.model_validate_json(wire) == request_


def test_names_of_transformers_are_understood() -> None:
    fields = {"max_new_tokens": 7, "stop_strings": "x", "do_sample": True}
    request = request_from_fields({"id": "i", "prompt": "p", **fields})
    assert request.sampling == SamplingParams(max_tokens=7, stop=["x"], temperature=1.0)
    nested = GenerationRequest.parse({"id": "i", "prompt": "p", "sampling": fields})
    assert nested == request


@pytest.mark.parametrize(
    ("fields", "temperature"),
    [
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"do_sample": True}, 1.0),
        ({"do_sample": None}, 0.0),
    ],
    ids=str,
)
def test_do_sample_decides_about_greedy(fields: dict[str, Any], temperature: float) -> None:
    assert SamplingParams(**fields).temperature == temperature


def test_another_name_goes_before_a_default() -> None:
    defaults = SamplingParams(max_tokens=64, temperature=0.7)
    request = as_request({"prompt": "p", "max_new_tokens": 8, "do_sample": False}, 0, defaults)
    assert (request.sampling.max_tokens, request.sampling.temperature) == (8, 0.0)


def test_raise_for_error_returns_text_and_raises_the_rest() -> None:
    fine = GenerationResult(id="a", finish_reason="length", text="x")
    assert fine.raise_for_error() is fine
    failed = GenerationResult.failed("a", ErrorDetail(code="c", message="too long"))
    with pytest.raises(GenerationFailedError, match="request 'a': too long"):
        failed.raise_for_error()


def test_requests_with_the_same_sampling_fields_share_them_unless_types_differ() -> None:
    def parsed(**sampling: Any) -> GenerationRequest:
        return GenerationRequest.parse({"id": "i", "prompt": "p", "sampling": sampling})

    assert parsed(max_tokens=1).sampling is parsed(max_tokens=1).sampling
    for wrong in (True, 1.5, "1"):
        with pytest.raises(InvalidRequestError, match="'max_tokens' is "):
            parsed(max_tokens=wrong)
    assert parsed(stop=["a"], logit_bias={"3": 1}).sampling.logit_bias == {3: 1.0}


def test_defaults_of_one_request_are_not_those_of_another() -> None:
    first, second = SamplingParams(), SamplingParams()
    first.bad_words.append("a")
    assert second.bad_words == []


def test_of_a_chunk_only_what_is_wrong_is_refused() -> None:
    good = {"id": "a", "prompt": "p", "sampling": {"max_tokens": 3}}
    bad = [
        {**good, "prompt": ""},
        {**good, "sampling": {"top_p": 2}},
        "text",
        dict.fromkeys("b" * 9),
    ]
    many = {f"field{i}": i for i in range(100)}
    alone = [str(error) for error in parse_items(bad)]
    assert alone[:2] == ["'prompt' is empty", "'top_p' is 2: must be at most 1"]
    found = parse_items([good, *bad, good, many])
    assert [found[0], found[-2]] == parse_items([good, good]) == [GenerationRequest.parse(good)] * 2
    assert [str(error) for error in found[1:-2]] == alone
    assert "100 fields; a request has no more than" in str(found[-1])
