"""Rows in and out: nothing of a row is lost, and a wrong one harms no other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from queue_api.datasets.columns import REQUEST_COLUMNS, Row, RowParser, output_row
from queue_api.datasets.dataset_input import DatasetInput
from queue_api.datasets.formats.json_record import JsonRecordReader, dump_row
from queue_api.datasets.formats.jsonl_sink import JsonLinesSink
from queue_api.datasets.formats.opening import open_source
from queue_api.datasets.formats.output_columns import OUTPUT_COLUMNS
from queue_api.datasets.formats.row_sink import MadeRow
from queue_api.datasets.formats.text_lines import MAX_LINE_BYTES
from queue_api.wire.errors import DatasetError, InvalidRequestError, RequestError
from queue_api.wire.schemas import (
    GenerationRequest,
    GenerationResult,
    SamplingParams,
    TokenLogprobs,
)

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def parse(*lines: str | bytes, **options: Any) -> list[Row]:
    parser = RowParser(**options)
    raw = [line.encode() if isinstance(line, str) else line for line in lines]
    reader = JsonRecordReader()
    return [parser.parse(reader.read(line, number)) for number, line in enumerate(raw, 1)]


def written(row: Row, text: str = "") -> dict[str, Any]:
    result = GenerationResult(id=row.id, index=row.index, text=text, finish_reason="stop")
    return json.loads(dump_row(output_row(row.columns, result)))


@settings(deadline=None)
@given(st.dictionaries(st.text(), JSON_VALUES, max_size=5), st.text(min_size=1))
def test_columns_come_back_untouched(columns: dict[str, Any], prompt: str) -> None:
    columns = {**{k: v for k, v in columns.items() if k not in OUTPUT_COLUMNS}, "prompt": prompt}
    (row,) = parse(json.dumps(columns), warn=lambda _: None)
    out = written(row, "text")
    assert {name: out[name] for name in columns if name != "id"} == {
        name: value for name, value in columns.items() if name != "id"
    }
    assert out["text"] == "text"
    if columns.get("id") is not None:
        assert out["id"] == columns["id"]
        assert type(out["id"]) is type(columns["id"])


def test_logprobs_are_a_column_and_no_field_when_the_output_is_used_as_input() -> None:
    (row,) = parse('{"prompt": "a", "logprobs": 0}')
    assert isinstance(row.request, GenerationRequest)
    assert row.request.sampling.logprobs == 0
    token = TokenLogprobs(token_id=5, token="x", logprob=-0.5, rank=1)
    result = GenerationResult(id="0", finish_reason="stop", logprobs=[token])
    out = output_row(row.columns, result)
    assert out["logprobs"] == [{"token_id": 5, "token": "x", "logprob": -0.5, "rank": 1, "top": []}]
    assert out["input_logprobs"] == 0
    (again,) = parse(json.dumps(out))
    assert isinstance(again.request, GenerationRequest)
    assert again.request.sampling.logprobs is None
    assert GenerationResult.model_validate_json(result.model_dump_json()) == result


def test_the_id_keeps_its_type_and_defaults_to_the_row() -> None:
    rows = parse('{"id": 17, "prompt": "a"}', '{"id": "x", "prompt": "a"}', '{"prompt": "a"}')
    assert [row.id for row in rows] == ["17", "x", "2"]
    assert [written(row)["id"] for row in rows] == [17, "x", "2"]


def test_sampling_fields_of_a_row_go_before_the_defaults() -> None:
    rows = parse(
        '{"prompt": "a", "max_tokens": 3}',
        '{"prompt": "a", "seed": null, "temperature": 0.5}',
        defaults=SamplingParams(max_tokens=9, seed=1),
    )
    sampling = [row.request.sampling for row in rows if isinstance(row.request, GenerationRequest)]
    assert [(s.max_tokens, s.seed, s.temperature) for s in sampling] == [(3, 1, 0), (9, 1, 0.5)]


@pytest.mark.parametrize("name", sorted(REQUEST_COLUMNS - {"id", "prompt", "messages"}))
def test_an_empty_string_is_no_value_where_none_could_be_one(name: str) -> None:
    defaults = SamplingParams(max_tokens=9, seed=1, stop=["x"], temperature=0.5)
    chat = [{"role": "user", "content": "a"}]
    with_it, without = parse(
        json.dumps({"messages": chat, "prompt": "", name: ""}),
        json.dumps({"messages": chat, "id": 1}),
        defaults=defaults,
    )
    assert isinstance(with_it.request, GenerationRequest)
    assert isinstance(without.request, GenerationRequest)
    assert with_it.request.model_copy(update={"id": "1"}) == without.request
    assert with_it.columns[name] == ""


@pytest.mark.parametrize("name", ["id", "prompt"])
def test_an_empty_text_is_an_error_where_texts_are_values(name: str) -> None:
    (row,) = parse(json.dumps({"prompt": "a", "messages": "", name: ""}))
    with pytest.raises(InvalidRequestError, match=f"'{name}' is empty"):
        raise row.request if isinstance(row.request, RequestError) else AssertionError


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "line 1: not JSON"),
        ("[1]", "line 1: not an object"),
        ('"text"', "line 1: not an object"),
        ('{"prompt": "a", "x": NaN}', "line 1: not JSON: NaN"),
        ('{"prompt": "a", "x": 1e999}', "too large a number"),
        ('{"prompt": "a", "x": ' + "1" * 5000 + "}", "JSON: 1{20} is too large a number$"),
        ("[" * 100_000, "line 1: not"),
        (b"\xff\xfe\xfd", "line 1: not JSON"),
        ('{"id": "a"}', "either 'prompt' or 'messages'"),
        ('{"prompt": ""}', "'prompt' is empty"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "not both"),
        ('{"messages": [{"role": "user"}]}', r"'messages\[0\].content' is missing"),
        ('{"prompt": "a", "max_tokens": 0}', "'max_tokens' is 0: must be at least 1"),
        ('{"prompt": "a", "id": true}', "'id' is True"),
        ('{"prompt": "a", "id": [1]}', r"'id' is \[1\]"),
        ('{"prompt": "\\ud800"}', "'prompt'"),
    ],
)
def test_a_wrong_row_says_what_is_wrong_and_the_next_is_fine(
    line: str | bytes, reason: str
) -> None:
    wrong, fine = parse(line, '{"prompt": "a"}')
    assert isinstance(wrong.request, RequestError)
    with pytest.raises(InvalidRequestError, match=reason):
        raise wrong.request
    assert isinstance(fine.request, GenerationRequest)
    failed = GenerationResult.failed(wrong.id, wrong.request, index=0)
    # it can travel and be written
    again = GenerationResult.model_validate_json(failed.model_dump_json())
    assert json.loads(dump_row(output_row(wrong.columns, again)))["error"]


def test_an_id_used_twice_names_the_first() -> None:
    rows = parse('{"id": 1, "prompt": "a"}', '{"id": "1", "prompt": "a"}', '{"prompt": "a"}')
    assert isinstance(rows[0].request, GenerationRequest)
    assert "id '1' is that of line 1 too" in str(rows[1].request)
    assert isinstance(rows[2].request, GenerationRequest)


def test_a_misspelt_field_is_warned_about_once() -> None:
    told: list[str] = []
    parse(*['{"prompt": "a", "max_token": 1, "Top-P": 1, "note": 1}'] * 3, warn=told.append)
    assert sorted(line.split(" has ")[0] for line in told) == [
        "column 'Top-P'",
        "column 'max_token'",
    ]
    assert any("'max_tokens'" in line for line in told)


def test_an_output_file_can_be_input_again() -> None:
    (first,) = parse('{"id": "a", "prompt": "p"}')
    (second,) = parse(json.dumps(written(first, "one")), warn=lambda _: None)
    out = written(second, "two")
    assert (out["text"], out["input_text"], out["prompt"]) == ("two", "one", "p")


def test_columns_travel_as_metadata_when_the_reader_lacks_the_input() -> None:
    (row,) = parse('{"id": 7, "prompt": "p", "note": [1]}', keep_columns=True)
    assert isinstance(row.request, GenerationRequest)
    result = GenerationResult(
        id=row.id, finish_reason="stop", metadata=row.request.metadata, index=0
    )
    out = output_row(result.metadata, result)
    assert (out["id"], out["note"]) == (7, [1])
    assert "prompt" not in out


def test_ids_that_are_numbers_stay_so_when_columns_travel() -> None:
    rows = parse(
        '{"id": 7, "prompt": "p"}',
        '{"id": 8, "prompt": "p", "max_tokens": 0}',
        '{"prompt": "p"}',
        "{broken",
        keep_columns=True,
    )
    parser = RowParser(keep_columns=True)
    shown = []
    for row in rows:
        if isinstance(row.request, RequestError):
            kept = parser.kept(row.columns, row.id)
            result = GenerationResult.failed(row.id, row.request, metadata=kept)
        else:
            metadata = row.request.metadata
            result = GenerationResult(id=row.id, finish_reason="stop", metadata=metadata)
        travelled = GenerationResult.model_validate_json(result.model_dump_json())
        shown.append(json.loads(dump_row(output_row(travelled.metadata, travelled)))["id"])
    assert shown == [7, 8, None, None]


def lines_of(content: bytes) -> list[tuple[int, bytes | None]]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with contextlib.closing(open_source(file.name)) as source:
            found = [(record.number, record.raw) for record in source.records()]
            assert source.count() == len(found)
        return found


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([b"", b" ", b"a", b"bc", b"\xc3\xa9" * 70_000]), max_size=8))
def test_lines_are_numbered_and_blank_ones_passed_over(lines: list[bytes]) -> None:
    expected = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    assert lines_of(b"\n".join(lines)) == expected


def test_a_byte_order_mark_is_dropped_and_an_endless_line_is_read_past() -> None:
    assert lines_of(b"\xef\xbb\xbfa\nb") == [(1, b"a"), (2, b"b")]
    endless = b"x" * (MAX_LINE_BYTES + 1)
    assert lines_of(b"a\n" + endless + b"\nb\n" + endless) == [
        (1, b"a"),
        (2, None),
        (3, b"b"),
        (4, None),
    ]


def test_a_pipe_is_read_as_it_fills() -> None:
    async def main() -> None:
        reading, writing = os.pipe()
        data = DatasetInput(f"/dev/fd/{reading}")
        rows = data.rows(RowParser())
        os.write(writing, b"one\ntw")
        assert await anext(rows)
        second = asyncio.ensure_future(anext(rows))
        os.write(writing, b"o\n")
        assert await second
        os.close(writing)
        assert await anext(rows, None) is None
        await data.close()
        os.close(reading)

    asyncio.run(main())


def test_a_pipe_that_brings_nothing_more_can_be_let_go_of() -> None:
    async def main() -> None:
        reading, writing = os.pipe()
        data = DatasetInput(f"/dev/fd/{reading}")
        os.write(writing, b"one\n")
        rows = data.rows(RowParser())
        assert await anext(rows)
        waiting = asyncio.ensure_future(anext(rows))
        await asyncio.sleep(0)
        waiting.cancel()
        await data.close()
        os.close(writing)
        os.close(reading)

    asyncio.run(main())


def made(row: int) -> MadeRow:
    return MadeRow(row, str(row), {"row": row, "id": row})


ROWS = st.lists(st.lists(st.integers(0, 9), max_size=4, unique=True), max_size=6)


@settings(deadline=None)
@given(batches=ROWS, crashes=st.lists(st.integers(0, 400), max_size=6))
def test_after_any_crash_each_row_is_in_the_file_once(
    batches: list[list[int]], crashes: list[int]
) -> None:
    """A crash may cut off anything of the batch that was being written, and nothing before."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.jsonl"
        for number, batch in enumerate(batches):
            sink = JsonLinesSink(path)
            before = path.stat().st_size
            sink.append([made(row) for row in batch if row not in sink])
            sink.close()
            if number < len(crashes):
                size = path.stat().st_size
                os.truncate(path, max(before, size - crashes[number]))
        sink = JsonLinesSink(path)
        wanted = {row for batch in batches for row in batch}
        missing = [row for row in wanted if row not in sink]
        sink.append([made(row) for row in missing])
        sink.close()
        found = [json.loads(line)["row"] for line in path.read_text().splitlines()]
        assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize(
    "content", ["my notes\nmore\n", "my notes\n", "my notes", '{"mine": 1}', '{"mine": 1}\n', "{\n"]
)
def test_a_file_of_others_is_never_cut(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(DatasetError, match=r"line 1 of .* isn't a row that batchmill wrote"):
        JsonLinesSink(path)
    assert path.read_text() == content


def test_two_sinks_of_a_file_exclude_each_other(tmp_path: Path) -> None:
    first = JsonLinesSink(tmp_path / "out.jsonl")
    with pytest.raises(DatasetError, match="another process is writing"):
        JsonLinesSink(tmp_path / "out.jsonl")
    first.close()
    JsonLinesSink(tmp_path / "out.jsonl").close()


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "out.jsonl", tmp_path):
        with pytest.raises(DatasetError, match="can't write"):
            JsonLinesSink(path)
