"""What of a row comes back, exactly, and which row pays for what can't."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from queue_api.client.client import Client
from queue_api.datasets.columns import Row, RowParser, check_fields, output_row
from queue_api.datasets.dataset_input import DatasetInput
from queue_api.datasets.formats.json_record import MAX_COLUMN_DEPTH, JsonRecordReader, dump_row
from queue_api.datasets.formats.opening import open_source
from queue_api.datasets.formats.text_lines import MAX_LINE_BYTES
from queue_api.wire.errors import (
    ConfigurationError,
    DatasetError,
    InvalidRequestError,
    RequestError,
)
from queue_api.wire.schemas import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    JobTimings,
    SamplingParams,
)


def parse(*lines: str | bytes, **options: Any) -> list[Row]:
    options.setdefault("warn", lambda _: None)
    parser = RowParser(**options)
    raw = [line.encode() if isinstance(line, str) else line for line in lines]
    reader = JsonRecordReader()
    return [parser.parse(reader.read(line, number)) for number, line in enumerate(raw, 1)]


def line_of(row: Row) -> bytes:
    if isinstance(row.request, RequestError):
        result = GenerationResult.failed(row.id, row.request, index=row.index)
    else:
        result = GenerationResult(id=row.id, index=row.index, finish_reason="stop")
    # as it travels
    again = GenerationResult.model_validate_json(result.model_dump_json())
    return dump_row(output_row(row.columns, again))


@pytest.mark.parametrize(
    "value",
    [
        "0.1234567890123456789012345",
        "-0.30000000000000001",
        "12345678901234567.25",
        "1e-400",
        "1.0",
        "1E5",
        '{"a": 1, "a": 2}',
        '[[{"k": 1.10000000000000000000001, "k": []}]]',
        str(10**40),
        '"\\u00e9 \\ud83d\\ude00"',
        '"\\\\ud83d"',
    ],
)
def test_a_column_comes_back_as_it_was_written(value: str) -> None:
    (row,) = parse(f'{{"prompt": "a", "x": {value}, "y": "é"}}')
    assert isinstance(row.request, GenerationRequest), row.request
    shown = re.search(r'"x":(.*),"y":"é"', line_of(row).decode())
    assert shown is not None
    if shown[1] != value:  # written otherwise, and the same to any reader
        read = json.loads(value)
        assert isinstance(read, str) or (isinstance(read, float) and len(value) < 16)
        assert json.loads(shown[1]) == read
    # and through Redis, where the reader lacks the input
    (row,) = parse(f'{{"prompt": "a", "x": {value}}}', keep_columns=True)
    assert isinstance(row.request, GenerationRequest)
    sent = GenerationRequest.model_validate_json(row.as_json or b"")
    result = GenerationResult(id="0", finish_reason="stop", metadata=sent.metadata)
    assert f'"x":{shown[1]},' in dump_row(output_row(result.metadata, result)).decode()


@pytest.mark.parametrize(
    ("line", "kept", "told"),
    [
        ('{"id": "a", "prompt": "p", "x": NaN, "y": 1}', {"id": "a", "y": 1}, "NaN in column 'x'"),
        ('{"id": 7, "prompt": "p", "x": [-Infinity]}', {"id": 7}, "-Infinity in column 'x'"),
        ('{"id": "a", "prompt": "p", "x": 1e999}', {"id": "a"}, "too large a number"),
        ('{"id": "a", "prompt": "p", "x": "\\ud83d"}', {"id": "a"}, "column 'x' has half"),
        ('{"id": "a", "prompt": "p", "x": {"\\udc00": 1}}', {"id": "a"}, "column 'x' has half"),
        ('{"id": "a", "prompt": "p", "x\\ud83d": 1}', {"id": "a"}, "the column name 'x"),
        ('{"id": "\\ud83d", "prompt": "p", "y": 1}', {"id": "\\ud83d", "y": 1}, "'id' has half"),
        ('{"id": "a", "prompt": "p", "x": 1, "x": 2}', {"id": "a", "x": 1}, "'x' is there twice"),
        ('{"id": "a", "prompt": "p", "prompt": "q"}', {"id": "a"}, "'prompt' is there twice"),
        (
            '{"id": "a", "messages": [{"role": "user", "content": "b", "content": "c"}]}',
            {"id": "a"},
            "'messages' has an object with a key that is there twice",
        ),
        ('{"id": "a", "prompt": "p", "x": {"k": "\\ud83d", "k": 1}}', {"id": "a"}, "has half"),
    ],
)
def test_a_row_with_a_column_that_cannot_be_written_keeps_the_others(
    line: str, kept: dict[str, Any], told: str
) -> None:
    wrong, fine = parse(line, '{"prompt": "a"}')
    assert isinstance(fine.request, GenerationRequest)
    out = json.loads(line_of(wrong).decode())
    assert {name: out.get(name) for name in kept} == kept
    assert told in out["error"]
    assert "line 1: " in out["error"]
    assert "x" in kept or "x" not in out


@pytest.mark.parametrize("depth", [5, 126, 127, 128, 129, 200, 965, 966, 3000, 100_000])
@pytest.mark.parametrize("form", ["[]", '{"[":}'])
@pytest.mark.parametrize("keep", [False, True])
def test_a_column_of_any_depth_comes_back_or_its_row_is_wrong(
    depth: int, form: str, keep: bool
) -> None:
    opened, closed = form[:-1], form[-1]
    value = opened * depth + ("0" if "{" in form else "") + closed * depth
    row, fine = parse(
        f'{{"id": "a", "prompt": "p", "x": {value}, "y": "]"}}',
        '{"prompt": "b"}',
        keep_columns=keep,
    )
    assert isinstance(fine.request, GenerationRequest)
    text = line_of(row).decode()
    out = json.loads(text)
    assert (out["id"], out["y"]) == ("a", "]")
    if isinstance(row.request, RequestError):
        assert depth > MAX_COLUMN_DEPTH
        assert f"column 'x' is nested deeper than {MAX_COLUMN_DEPTH} levels" in out["error"]
    else:
        assert value in text.replace(" ", "")


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet='{}[]",:\\u d83 1eNa.-\n', max_size=60))
def test_no_line_is_too_odd(line: str) -> None:
    found = JsonRecordReader().read(line.encode())
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    assert (found.error is None) <= isinstance(value, dict)
    json.loads(dump_row(output_row(found.shown, GenerationResult(id="0", finish_reason="stop"))))


def test_a_default_id_never_costs_a_row() -> None:
    rows = parse(
        '{"id": "1", "prompt": "a"}',
        '{"prompt": "b"}',
        '{"prompt": "c"}',
        '{"id": 2, "prompt": "d"}',
        '{"id": 2, "prompt": "e"}',
    )
    assert [isinstance(row.request, GenerationRequest) for row in rows] == [True] * 4 + [False]
    assert len({row.id for row in rows[:4]}) == 4
    assert "line 4" in str(rows[4].request)
    assert [json.loads(line_of(row))["id"] for row in rows] == ["1", "row-1", "2", 2, 2]


def test_ids_that_are_numbers_stay_a_column_of_numbers() -> None:
    rows = parse('{"id": 7, "prompt": "a"}', "{broken", '{"prompt": "b"}', '{"id": 9}')
    assert [json.loads(line_of(row))["id"] for row in rows] == [7, None, None, 9]


def test_a_sampling_object_counts_and_leaves_the_options_that_it_has_not() -> None:
    rows = parse(
        '{"prompt": "a", "sampling": {"max_tokens": 9}}',
        '{"prompt": "a", "sampling": {}}',
        '{"prompt": "a", "sampling": "nucleus"}',
        '{"prompt": "a", "sampling": {"max_new_tokens": 3}}',
        defaults=SamplingParams(max_tokens=5, ignore_eos=True),
    )
    asked = [row.request.sampling for row in rows if isinstance(row.request, GenerationRequest)]
    assert [sampling.max_tokens for sampling in asked] == [9, 5, 5, 3]
    assert all(sampling.ignore_eos for sampling in asked)
    assert json.loads(line_of(rows[2]))["sampling"] == "nucleus"


def test_columns_can_be_kept_from_being_fields() -> None:
    line = '{"prompt": "a", "temperature": 36.6, "n": "x", "seed": 7}'
    told: list[str] = []
    (wrong,) = parse(line, warn=told.append)
    assert isinstance(wrong.request, RequestError)
    (plain,) = parse(line, fields=check_fields(()), warn=told.append)
    (seeded,) = parse(line, fields=check_fields(["seed"]), warn=told.append)
    for row, seed in ((plain, None), (seeded, 7)):
        assert isinstance(row.request, GenerationRequest)
        assert row.request.sampling == SamplingParams(seed=seed)
        assert json.loads(line_of(row))["temperature"] == 36.6
    assert len({plain.fingerprint, seeded.fingerprint, wrong.fingerprint}) == 3
    assert len(told) == 1
    assert "'n', 'seed', 'temperature'" in told[0]
    assert "--no-row-sampling" in told[0]
    with pytest.raises(ConfigurationError, match="'temprature' isn't a field of a request"):
        check_fields(["temprature"])


FOREIGN = [
    "tool_choice", "add_generation_prompt", "max_completion_tokens", "max_output_tokens",
    "max_length", "stop_sequences", "system", "sampling_params", "extra_body", "guided_json",
    "guided_choice", "allowed_token_ids", "no_repeat_ngram_size", "num_beams", "eos_token_id",
    "echo", "skip_special_tokens", "truncate_prompt_tokens", "min_new_tokens", "best_of",
    "prompt_token_ids", "top_logprobs", "bad_words_ids", "body", "enable_thinking", "Guided-Regex",
]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_field_of_another_tool_is_told_once_with_what_to_write(name: str) -> None:
    told: list[str] = []
    line = json.dumps({"prompt": "a", name: 1})
    empty = json.dumps({"prompt": "a", name: None})
    rows = parse(empty, line, line, warn=told.append)
    assert all(isinstance(row.request, GenerationRequest) for row in rows)
    (only,) = told
    assert f"column {name!r} has no effect" in only
    assert json.loads(line_of(rows[1]))[name] == 1


@pytest.mark.parametrize("name", [name for name in FOREIGN if name.islower()])
def test_a_call_refuses_the_fields_that_rows_are_warned_of(name: str) -> None:
    async def main() -> None:
        client = Client("unix:///none")
        with pytest.raises(InvalidRequestError, match=f"unknown field '{name}' \\("):
            await client.generate("a", **{name: 1})  # type: ignore[misc]
        await client.close()

    asyncio.run(main())


def _rows_of_all_kinds() -> dict[str, bytes]:
    timings = JobTimings(total_s=0.5, time_to_first_token_s=0.1, inter_token_s=0.1, stage_s=[0.1])
    by = {"model": "m", "model_revision": "r", "worker": "w"}
    good = GenerationResult(id="0", text="t", finish_reason="stop", timings=timings, **by)
    short = GenerationResult(id="0", text="t", finish_reason="length", **by)
    failed = GenerationResult.failed("0", InvalidRequestError("wrong"))
    cancelled = GenerationResult(id="0", finish_reason=FinishReason.CANCELLED)
    return {
        name: dump_row(output_row({"prompt": "p"}, result, "f" * 16))
        for name, result in {
            "good": good,
            "short": short,
            "failed": failed,
            "cancelled": cancelled,
        }.items()
    }


def _type(value: object) -> object:
    if isinstance(value, dict):
        return {name: _type(part) for name, part in value.items()}
    return [_type(value[0])] if isinstance(value, list) else type(value)


def test_every_row_has_the_same_columns_of_the_same_types() -> None:
    """Readers of tables take the first rows' types for all: null first, and then an object, is
    refused by pyarrow, polars and datasets."""
    types = {name: _type(json.loads(line)) for name, line in _rows_of_all_kinds().items()}
    assert types["failed"] == types["short"] == types["cancelled"] == types["good"]
    assert "None" not in str(types)
    failed = json.loads(_rows_of_all_kinds()["failed"])
    assert (failed["error"], failed["error_code"]) == ("wrong", "invalid_request")
    assert json.loads(_rows_of_all_kinds()["good"])["error"] == ""


@pytest.mark.parametrize("last", ["failed", "good"])
def test_pyarrow_reads_an_output_whose_last_row_is_of_another_kind(
    tmp_path: Path, last: str
) -> None:
    reader = pytest.importorskip("pyarrow.json", reason="pyarrow isn't needed otherwise")
    lines = _rows_of_all_kinds()
    first = "good" if last == "failed" else "failed"
    (tmp_path / "out.jsonl").write_bytes(lines[first] * 20_000 + lines[last])
    table = reader.read_json(tmp_path / "out.jsonl")
    assert table["error"][-1].as_py() == json.loads(lines[last])["error"]


TEXT = "".join(f'{{"prompt": "é {n}"}}\n' for n in range(3))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]
)
def test_encodings_and_line_ends_are_known(tmp_path: Path, end: str, encoding: str) -> None:
    path = tmp_path / "in.jsonl"
    content = TEXT.replace("\n", end).encode(encoding)
    for written in (content, content.removesuffix(end.encode(encoding.removesuffix("-sig")))):
        path.write_bytes(written)
        assert prompts_of(path) == ["é 0", "é 1", "é 2"]
        assert num_rows(path) == 3


def num_rows(path: Path) -> int | None:
    with contextlib.closing(open_source(path)) as source:
        return source.count()


def prompts_of(path: Path) -> list[str]:
    async def main() -> list[str]:
        data = DatasetInput(path)
        try:
            rows = [row async for row in data.rows(RowParser(warn=lambda _: None))]
        finally:
            await data.close()
        return [
            str(row.request.prompt) if isinstance(row.request, GenerationRequest) else "wrong"
            for row in rows
        ]

    return asyncio.run(main())


def test_files_put_behind_one_another_keep_their_first_rows(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(TEXT.encode("utf-8-sig") * 2)
    assert prompts_of(path) == ["é 0", "é 1", "é 2"] * 2


def test_a_broken_end_of_utf16_is_one_wrong_row(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(TEXT.encode("utf-16")[:-5])
    assert prompts_of(path) == ["é 0", "é 1", "wrong"]


def look(path: Path, **options: Any) -> str:
    async def main() -> str:
        data = DatasetInput(path)
        try:
            await data.look(**options)
        except DatasetError as error:
            return str(error)
        finally:
            await data.close()
        return ""

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x1f\x8b\x08\x00abc", "is gzip that was cut off"),
        (b"\x28\xb5\x2f\xfdabc", "is zstd that was cut off"),
        (b"PK\x03\x04abc", "is a zip archive"),
        (b"PAR1\x15\x04", "isn't whole Parquet"),
        (b"ARROW1\x00\x00", "is damaged Arrow"),
        (b"SQLite format 3\x00", "is an SQLite database"),
        (b'[\n  {"text": "a"}\n]\n', "if that is the prompt: --prompt-column text"),
        (b'[{"prompt": "a"}', "is a JSON array without its end"),
        (b'["a", "b"]', "jq -c '.[] | {prompt: .}'"),
        (b'[\n  "a"\n]\n', "jq -c '.[] | {prompt: .}'"),
        (b'{"a": 1, "data": [{"prompt": "a"}]}', "jq '.[\"data\"]' "),
        (b'{\n "data": [\n  {"prompt": "a"}\n ]\n}', "jq '.[\"data\"]' "),
        (b'{"data": [' + b'{"prompt": "a"}, ' * 10**6 + b"{}]}", "jq '.[\"data\"]' "),
        (b'{ "prompt": "a"\n}\n', "has objects over several lines"),
        (
            b"question,n\na,1\nb,2\n",
            "Its columns are 'n', 'question'; if that is the prompt: --prompt-column",
        ),
        (
            b"id\ttext\n1\ta\n",
            "Its columns are 'id', 'text'; if that is the prompt: --prompt-column",
        ),
        (b"id,prompt\n1,a,b\n", "looks like plain text: --format txt"),
        (b"What is 2 + 3?\nAnd then?\n", "looks like plain text: --format txt"),
        (b"Well, what is it?\nAnd then, what?\n", "looks like CSV with the columns 'Well'"),
        (b'{"question": "a"}\n' * 3, "if that is the prompt: --prompt-column question"),
        (b'{"prompt": ""}\n', "line 1: 'prompt' is empty"),
        (b'{"prompt": "a", "n": "x"}\n', "If 'n' are columns of yours"),
        (b'{"custom_id": "a", "body": {"messages": []}}\n', "'url' is missing"),
        (b"\x7fELF\x02\x01\xff\n", "can be read"),
        (b"7\n8\n", "not an object but '7'"),
    ],
)
def test_a_file_without_a_readable_row_says_what_it_is(
    tmp_path: Path, content: bytes, told: str
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    assert told in look(path)


def test_one_readable_row_is_enough_however_late_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"question": "a"}\n' * 30_000 + b'{"prompt": "a"}\n')
    assert look(path) == ""
    assert look(path, fields=check_fields(())) == ""
    path.write_bytes(b"\n\n")
    assert look(path) == ""


def test_nan_is_no_number_to_anyone() -> None:
    assert math.isnan(json.loads("NaN"))  # so Python's reader alone doesn't refuse it
    (row,) = parse('{"prompt": "a", "temperature": NaN}')
    assert isinstance(row.request, RequestError)


def test_an_endless_line_is_counted_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        for _ in range(96):
            file.write(b"word " * 2**18)
        file.write(b"\n{}\n")
    tracemalloc.start()
    try:
        assert num_rows(path) == 2
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_LINE_BYTES
    finally:
        tracemalloc.stop()
