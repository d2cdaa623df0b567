"""The wire models: what is wrong with a request is said as its author would say it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_api.errors import GenerationFailedError, InvalidRequestError
from queue_api.jobs import request_from_fields
from queue_api.schemas import ErrorDetail, GenerationRequest, GenerationResult, SamplingParams


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": []}, "'prompt' has no tokens; give at least one"),
        ({"prompt": 3}, "'prompt' is 3: must be a valid string"),
        ({"prompt": [5, -1]}, "'prompt[1]' is -1: must be at least 0"),
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
        ),
        metadata=st.dictionaries(st.just("key"), st.integers() | st.none()),
    )
)
def test_a_request_travels_unchanged(request_: GenerationRequest) -> None:
    wire = request_.model_dump_json(exclude_defaults=True)
    assert GenerationRequest.model_validate_json(wire) == request_


def test_raise_for_error_returns_text_and_raises_the_rest() -> None:
    fine = GenerationResult(id="a", finish_reason="length", text="x")
    assert fine.raise_for_error() is fine
    failed = GenerationResult.failed("a", ErrorDetail(code="c", message="too long"))
    with pytest.raises(GenerationFailedError, match="request 'a': too long"):
        failed.raise_for_error()
