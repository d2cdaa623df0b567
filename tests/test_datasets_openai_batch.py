"""Lines of OpenAI's batch format: recognised, and answered or refused field by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kits.layout_kit import look, parse, parser, request, turns, wrong

from queue_api.datasets.columns import output_row
from queue_api.datasets.formats.json_record import JsonRecordReader
from queue_api.wire.schemas import GenerationResult, SamplingParams

MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]


def line(url: str = "/v1/chat/completions", /, **body: Any) -> dict[str, Any]:
    prompt = {} if "messages" in body or "prompt" in body else {"messages": MESSAGES}
    body = {"model": "gpt-4o-mini", **prompt, **body}
    return {"custom_id": "request-1", "method": "POST", "url": url, "body": body}


def text_line(**body: Any) -> dict[str, Any]:
    return line("/v1/completions", **{"prompt": "Once", **body})


def test_a_chat_is_asked_with_all_fields_that_there_are() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    body = {
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "stop": ["\n"],
        "seed": 7,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"50": -100},
        "logprobs": True,
        "top_logprobs": 4,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        "tools": [{"type": "function", "function": {"name": "f"}}],
        # say nothing of the text, or what is so without them
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "stream": False,
        "stream_options": None,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "audio": None,
    }
    (row,) = parse(line(**body))
    asked = request(row)
    assert (row.id, asked.id, turns(row)) == (
        "request-1",
        "request-1",
        [("user", "What is 2 + 3?")],
    )
    sampling = asked.sampling.model_dump(exclude_unset=True)
    assert sampling.pop("structured_outputs")["json"] == schema
    assert sampling == {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "stop": ["\n"],
        "seed": 7,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {50: -100.0},
        "logprobs": 4,
    }
    assert asked.tools == body["tools"]


def test_texts_are_asked_too() -> None:
    rows = parse(
        text_line(max_tokens=5, logprobs=2, n=2, best_of=2, temperature=1, echo=False, suffix=""),
        {**text_line(prompt=["Once"]), "custom_id": "b"},
        {**text_line(prompt=[5, 6]), "custom_id": "c"},
        {**text_line(prompt=[[5, 6]]), "custom_id": "d"},
    )
    assert [request(row).prompt for row in rows] == ["Once", "Once", [5, 6], [5, 6]]
    sampling = request(rows[0]).sampling
    assert (sampling.max_tokens, sampling.logprobs, sampling.n) == (5, 2, 2)


def test_messages_of_every_kind_are_taken() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "Be brief.", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [],
         "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "5"},
        {"role": "assistant", "content": "Five.", "function_call": None, "tool_calls": []},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    (row,) = parse(line(messages=messages))
    roles = [role for role, _ in turns(row)]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert [m.tool_calls for m in request(row).messages or ()] == [
        None, None, [call], None, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (line("/v1/embeddings", input="a"), "'url' is '/v1/embeddings': batchmill answers"),
        (line("/v1/responses", input="a"), "'url' is '/v1/responses'"),
        ({**line(), "url": None}, "'url' is missing"),
        ({**line(), "method": "GET"}, "'method' is 'GET': must be POST"),
        ({**line(), "custom_id": None}, "'custom_id' is missing"),
        ({**line(), "body": None}, "'body' is None: must be an object"),
        ({**line(), "body": "{"}, "'body' is '{': must be an object"),
        (line(messages=None), "'body' has no list of 'messages'"),
        (line(messages=[]), "'messages' is empty"),
        (line(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "only text"),
        (line(stream=True), "'body' has 'stream', True: batchmill doesn't do that"),
        (line(tool_choice="required"), "'body' has 'tool_choice', 'required'"),
        (line(functions=[{}]), "'functions', [{}]: write 'tools'"),
        (line(modalities=["audio"]), "'body' has 'modalities', ['audio']"),
        (line(web_search_options={}), "'web_search_options', {}: batchmill has no such field"),
        (line(reasoning_effort="low"), "write 'chat_template_kwargs'"),
        (
            line(max_tokens=3, max_completion_tokens=4),
            "'max_completion_tokens' in 'body', not both",
        ),
        (line(max_tokens=0), "'max_tokens' is 0: must be at least 1"),
        (line(logprobs=3), "'logprobs' in 'body' is 3: must be true or false"),
        (line(top_logprobs=3), "'top_logprobs' in 'body' needs 'logprobs': true"),
        (line(prompt="a", messages=MESSAGES), "'body' has 'prompt'"),
        (line(id="a"), "'body' has 'id'"),
        (line(sampling={"seed": 1}), "'body' has 'sampling'"),
        (text_line(prompt=["a", "b"]), "write each prompt on a line of its own"),
        (text_line(prompt=None), "'body' has no 'prompt'"),
        (text_line(echo=True), "the text never repeats the prompt"),
        (text_line(best_of=3), "'best_of' in 'body' is 3"),
        (text_line(tools=[]), "'body' has 'tools'"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name_and_the_next_line_is_fine(
    columns: dict[str, Any], told: str
) -> None:
    bad, fine = parse(columns, {**line(), "custom_id": "fine"})
    assert told in wrong(bad)
    assert wrong(bad).startswith("line 1: ")
    assert fine.id == request(fine).id == "fine"
    # the id of a wrong line is its own, too: error files are joined by it
    assert bad.id == (columns["custom_id"] or "0")


def test_nulls_of_a_table_count_as_absent() -> None:
    body = json.dumps({**line()["body"], "temperature": None, "stop": None, "tool_choice": None})
    (row,) = parse({**line(), "body": body, "prompt": None})
    assert turns(row) == [("user", "What is 2 + 3?")]


def test_ids_are_unique_and_the_line_comes_back_whole() -> None:
    first, second = parse(line(), line())
    assert "id 'request-1' is that of line 1 too" in wrong(second)
    result = GenerationResult(id=first.id, index=0, finish_reason="stop")
    out = output_row(first.columns, result)
    assert {name: out[name] for name in line()} == line()
    assert out["id"] == "request-1"
    read = parser(keep_columns=True)
    row = read.parse(JsonRecordReader().read(json.dumps({**line(), "note": 1}).encode()))
    assert request(row).metadata == {
        **line(), "body": {"model": "gpt-4o-mini"}, "note": 1,
    }  # fmt: skip


def test_what_lines_leave_out_has_the_commands_options_and_that_is_said_once() -> None:
    told: list[str] = []
    rows = [{**line(), "custom_id": str(i)} for i in range(3)]
    read = parse(*rows, defaults=SamplingParams(max_tokens=3), warn=told.append)
    assert {request(row).sampling.max_tokens for row in read} == {3}
    assert [line for line in told if "'gpt-4o-mini': this run's model answers them" in line]
    assert [line for line in told if "not OpenAI's" in line]
    assert len(told) == 2


def test_other_rows_with_a_body_are_no_batch_lines(tmp_path: Path) -> None:
    (row,) = parse({"custom_id": "a", "url": "/v1/x", "body": "text", "prompt": "p"})
    assert request(row).prompt == "p"
    (row,) = parse({"custom_id": "a", "url": "u", "body": "text"}, prompt_column="body")
    assert (request(row).prompt, row.id) == ("text", "0")
    (row,) = parse({"url": "https://example.org", "body": "text"})
    assert "either 'prompt' or 'messages'" in wrong(row)


def test_a_file_of_lines_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(line("/v1/embeddings")) + "\n" + json.dumps(line()) + "\n")
    assert look(path) == ("OpenAI batch lines, the first for /v1/chat/completions", "")
    path.write_text(json.dumps(line("/v1/embeddings")) + "\n")
    assert "batchmill answers /v1/chat/completions and /v1/completions" in look(path)[1]
