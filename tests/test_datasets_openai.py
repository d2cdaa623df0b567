"""OpenAI's batch format as an output is read by OpenAI's own types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kits.sink_kit import lines_of

from queue_api.datasets.columns import output_row
from queue_api.datasets.formats.output_opening import open_sink
from queue_api.datasets.formats.output_options import OutputOptions
from queue_api.datasets.formats.row_sink import MadeRow
from queue_api.wire.schemas import CompletionOutput, ErrorDetail, GenerationResult, TokenLogprobs

openai_types = pytest.importorskip("openai.types")

CHAT = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"}}
TOKENS = [
    TokenLogprobs(token_id=1, token="né", logprob=-0.5, rank=1, top=[]),
    TokenLogprobs(token_id=2, token="\ufffd", logprob=-1.5, rank=1, top=[]),
]


def line(columns: dict[str, Any], folder: Path, **result: Any) -> tuple[dict[str, Any], bool]:
    """The line that a row becomes, and whether it is in the file of errors."""
    result = {"finish_reason": "stop", "text": "né", "model": "m", "prompt_tokens": 3, **result}
    made = GenerationResult(id="7", index=4, completion_tokens=2, **result)
    output = folder / "out.jsonl"
    sink = open_sink(output, OutputOptions("openai"))
    sink.append([MadeRow(4, "f" * 16, output_row(columns, made, "f" * 16), 5)])
    sink.close()
    found = [lines_of(path.read_bytes()) for path in (output, Path(f"{output}.errors.jsonl"))]
    ((only,),) = [lines for lines in found if lines]
    assert set(only) == {"id", "custom_id", "response", "error", "batchmill"}
    assert only["batchmill"]["row"] == 4
    return only, bool(found[1])


def test_a_chat_is_a_chat_completion(tmp_path: Path) -> None:
    found, is_apart = line(CHAT, tmp_path, logprobs=TOKENS, model_revision="abc")
    assert (found["custom_id"], found["error"], is_apart) == ("c", None, False)
    assert found["response"]["status_code"] == 200
    assert found["response"]["request_id"]
    body = openai_types.chat.ChatCompletion.model_validate(found["response"]["body"], strict=True)
    assert body.choices[0].message.content == "né"
    assert body.choices[0].finish_reason == "stop"
    assert body.usage.total_tokens == 5
    tokens = body.choices[0].logprobs.content
    assert [token.bytes for token in tokens] == [list("né".encode()), None]
    assert body.model_extra == {}


def test_a_plain_prompt_is_a_completion(tmp_path: Path) -> None:
    columns = {"prompt": "p", "id": 12}
    found, _ = line(columns, tmp_path, logprobs=TOKENS, finish_reason="length")
    assert found["custom_id"] == "12"
    body = openai_types.Completion.model_validate(found["response"]["body"], strict=True)
    assert (body.object, body.choices[0].text) == ("text_completion", "né")
    assert body.choices[0].finish_reason == "length"
    assert body.choices[0].logprobs.text_offset == [0, 2]
    assert body.model_extra == {}


def test_several_samples_are_several_choices(tmp_path: Path) -> None:
    outputs = [CompletionOutput(index=i, text=f"t{i}", finish_reason="stop") for i in range(3)]
    found, _ = line(CHAT, tmp_path, outputs=outputs)
    body = openai_types.chat.ChatCompletion.model_validate(found["response"]["body"], strict=True)
    assert [choice.message.content for choice in body.choices] == ["t0", "t1", "t2"]


@pytest.mark.parametrize(
    ("result", "code"),
    [
        ({"error": ErrorDetail(code="prompt_too_long", message="long")}, "prompt_too_long"),
        ({}, "batch_error"),
        ({"finish_reason": "cancelled"}, "batch_cancelled"),
    ],
)
def test_what_has_no_text_is_in_the_file_of_errors(
    tmp_path: Path, result: dict[str, Any], code: str
) -> None:
    found, is_apart = line(CHAT, tmp_path, **{"finish_reason": "error", "text": "", **result})
    assert is_apart
    assert found["response"] is None
    error = openai_types.BatchError.model_validate(found["error"], strict=True)
    assert (error.code, error.line) == (code, 5)
    assert error.message


def test_a_row_with_a_half_of_a_pair_is_written(tmp_path: Path) -> None:
    found, _ = line({**CHAT, "custom_id": "\ud83d"}, tmp_path)
    assert json.dumps(found["custom_id"]) == '"\\ud83d"'
