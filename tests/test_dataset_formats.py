"""Every format of inputs gives the rows that its own library reads; of damaged ones the first."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tempfile
import threading
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st
from kits.format_kit import (
    FORMATS,
    Format,
    check_cut,
    check_damage,
    check_pipe,
    check_rows,
    most_memory,
    rows_made,
)

from queue_api.datasets.formats.json_record import dump_row
from queue_api.datasets.formats.json_source import elements_of
from queue_api.datasets.formats.opening import open_source
from queue_api.datasets.formats.record import RawJson, Record
from queue_api.datasets.formats.text_lines import MAX_LINE_BYTES
from queue_api.wire.errors import DatasetError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=5,
)

ROWS = [{"id": i, "prompt": f"é {i}", "note": "x" * (i % 7)} for i in range(5000)]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


def records_of(path: Path) -> list[Record]:
    with closing(open_source(path)) as source:
        return list(source.records())


def rows_before_the_error(path: Path) -> tuple[list[dict[str, Any]], str]:
    rows = []
    with closing(open_source(path)) as source:
        try:
            for record in source.records():
                assert record.error is None, record.error
                rows.append(record.read)
        except DatasetError as error:
            return rows, str(error)
    return rows, ""


# ----------------------------------------------------------------------------------- all of them

each_format = pytest.mark.parametrize("kind", FORMATS, ids=[kind.name for kind in FORMATS])


@each_format
@pytest.mark.parametrize("count", [0, 1, 3000])
def test_the_rows_are_those_that_its_own_library_reads(
    tmp_path: Path, kind: Format, count: int
) -> None:
    path = kind.input(tmp_path)
    kind.write(rows_made(count), path)
    assert len(kind.read(path)) == count
    check_rows(kind, path)


@each_format
def test_rows_come_through_a_pipe(tmp_path: Path, kind: Format) -> None:
    path = kind.input(tmp_path)
    kind.write(rows_made(3000), path)
    check_pipe(kind, path, tmp_path / "fifo")


@each_format
def test_of_a_file_that_was_cut_off_the_first_rows_are_read(tmp_path: Path, kind: Format) -> None:
    path = kind.input(tmp_path)
    kind.write(rows_made(2000), path)
    size = path.stat().st_size
    check_cut(kind, path, iter([30, size // 3, size // 2 + 1, size - 40, size - 9, size - 2]))


@each_format
def test_no_damage_ends_in_anything_but_an_error_of_ours(tmp_path: Path, kind: Format) -> None:
    """Libraries believe what files say: Arrow ends the process where a batch lies of its length."""
    path = kind.input(tmp_path)
    kind.write(rows_made(300), path)
    check_damage(path, seed=1, times=300 if kind.place == "row {}" else 40)


@each_format
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: Format) -> None:
    path = kind.input(tmp_path)
    kind.write(rows_made(2000, size=1000), path)
    few = most_memory(path)
    kind.write(rows_made(16_000, size=1000), path)
    assert most_memory(path) < few + 4 * 2**20


# ------------------------------------------------------------------------------------ compressed


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows"])
def test_what_is_packed_is_read_whatever_its_name_is(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    content = b"".join(LINES)
    # several members, one of them empty, and their ends anywhere in a line
    parts = [content[:1], b"", content[1:70_001], content[70_001:]]
    path.write_bytes(b"".join(map(PACK[kind], parts)))
    with closing(open_source(path)) as source:
        for _ in range(2):
            assert [record.read for record in source.records()] == ROWS
        assert source.count() == len(ROWS)


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.999])
def test_of_a_file_that_was_cut_off_the_rows_before_are_read(
    tmp_path: Path, kind: str, share: float
) -> None:
    path = tmp_path / "rows.jsonl"
    packed = PACK[kind](b"".join(LINES))
    path.write_bytes(packed[: int(share * len(packed))])
    rows, told = rows_before_the_error(path)
    assert rows == ROWS[: len(rows)]
    assert told.startswith(f"{path} is {kind} that was cut off")


@pytest.mark.parametrize("kind", PACK)
def test_of_a_damaged_file_the_rows_before_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    half = PACK[kind](b"".join(LINES[:2500]))
    path.write_bytes(half + b"no more of it")
    rows, told = rows_before_the_error(path)
    assert rows == ROWS[:2500]
    assert told.startswith(f"{path} is damaged {kind}")
    for place in range(20, len(half), len(half) // 7):
        path.write_bytes(half[:place] + bytes([half[place] ^ 0xFF]) + half[place + 1 :])
        with closing(open_source(path)) as source, pytest.raises(DatasetError, match=str(path)):
            list(source.records())


def test_what_is_packed_twice_is_unpacked_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.gz"
    path.write_bytes(gzip.compress(bz2.compress(LINES[0])))
    assert [record.read for record in records_of(path)] == ROWS[:1]


def test_a_padded_gzip_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(gzip.compress(LINES[0]) + bytes(1000) + gzip.compress(LINES[1]) + bytes(512))
    assert [record.read for record in records_of(path)] == ROWS[:2]


@pytest.mark.parametrize("kind", PACK)
def test_what_unpacks_to_very_much_is_read_in_pieces(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows"
    packed = PACK[kind](b"\n" * 2**24 + LINES[0])
    path.write_bytes(packed)
    with closing(open_source(path)) as source:
        assert max(map(len, source.data.blocks())) <= 2**18
        assert [record.read for record in source.records()] == ROWS[:1]


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_packed_pipe_is_read_once(tmp_path: Path, kind: str, is_whole: bool) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    packed = PACK[kind](b"".join(LINES))
    content = packed if is_whole else packed[:-9]
    writer = threading.Thread(target=fifo.write_bytes, args=(content,))
    writer.start()
    rows, told = rows_before_the_error(fifo)
    writer.join()
    assert rows == (ROWS if is_whole else ROWS[: len(rows)])
    assert ("cut off" in told) != is_whole


# ------------------------------------------------------------------------------------------ JSON


def in_pieces(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


ODD_ELEMENTS = [
    '{"a": "x,]\\"}"}',
    ' {"b": [1, {"c": 2}, []]} ',
    "3",
    '"s"',
    "[1, 2]",
    "{bad}",
    '{"x": "a\nb"}',
    '{"a": 1}}',
    "",
    '{"é\\\\": "\\u00e9\\\\\\""}',
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_elements_are_found_wherever_blocks_end(size: int) -> None:
    content = f"[{','.join(ODD_ELEMENTS)}]".encode()
    expected = [element.strip().encode() for element in ODD_ELEMENTS]
    assert list(elements_of(in_pieces(content, size), "f")) == expected
    objects = b'{\n "a": [{"b": "}"}]\n}\n{\n}{"c": 1}'
    found = list(elements_of(in_pieces(objects, size), "f"))
    assert [json.loads(element or b"") for element in found] == [
        {"a": [{"b": "}"}]},
        {},
        {"c": 1},
    ]


@given(st.lists(st.dictionaries(st.text(), JSON_VALUES)), st.integers(1, 40), st.booleans())
def test_any_array_is_split_as_the_reader_of_json_does(
    rows: list[dict[str, Any]], size: int, over_lines: bool
) -> None:
    content = json.dumps(rows, indent=1 if over_lines else None, ensure_ascii=over_lines)
    try:
        blocks = in_pieces(content.encode(), size)
    except UnicodeEncodeError:
        blocks = in_pieces(json.dumps(rows).encode(), size)
    assert [json.loads(element or b"") for element in elements_of(blocks, "f")] == rows


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
def test_an_array_is_told_by_content(
    tmp_path: Path, encoding: str, indent: int | None, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(json.dumps(ROWS[:500], indent=indent, ensure_ascii=False).encode(encoding))
    with closing(open_source(path)) as source:
        for _ in range(2):
            assert [record.read for record in source.records()] == ROWS[:500]
        assert source.count() == 500
        assert source.place(3) == "element 3"
    path.write_bytes("".join(json.dumps(row) + "\n" for row in ROWS[:500]).encode(encoding))
    assert [record.read for record in records_of(path)] == ROWS[:500]


def test_a_wrong_element_is_one_wrong_row_and_a_decimal_stays(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"x": 0.12345678901234567890}, {"x": NaN}, 7, {"x": 1,}, {"y": 2}]')
    first, nan, number, comma, last = records_of(path)
    assert first.shown == {"x": "0.12345678901234567890"}
    assert [record.number for record in (nan, number, comma)] == [2, 3, 4]
    assert "NaN in column 'x'" in str(nan.error)
    assert "not an object but '7'" in str(number.error)
    assert "not JSON" in str(comma.error)
    assert last.read == {"y": 2}


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("", "is a JSON array without its end"),
        (', {"prompt": "b', "is a JSON array without its end"),
        ('] {"prompt": "b"}', "goes on after its JSON array, which has 2 elements"),
        ("] ]", "goes on after its JSON array"),
    ],
)
def test_an_array_that_is_cut_off_or_goes_on_keeps_its_first_rows(
    tmp_path: Path, end: str, told: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(f'[{{"prompt": "a"}}, {{"prompt": "b"}}{end}')
    rows, error = rows_before_the_error(path)
    assert rows[:1] == [{"prompt": "a"}]
    assert told in error
    assert str(path) in error


def test_an_endless_element_is_read_past_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with path.open("wb") as file:
        file.write(b'[{"a": "')
        for _ in range(64):
            file.write(b"word\\n\\" * 2**17)
            file.write(b'"')
        file.write(b'"}, {"b": [')
        file.write((b"[1, " + b"3" * 990 + b"], ") * 2**15)
        file.write(b'3]}, {"c": 1}]')
    tracemalloc.start()
    try:
        found = records_of(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_LINE_BYTES
    finally:
        tracemalloc.stop()
    assert [record.read for record in found] == [{}, {}, {"c": 1}]
    assert [record.number for record in found if record.error] == [1, 2]


# ------------------------------------------------------------------------------------- CSV, text

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def csv_of(rows: list[list[str]], separator: str, end: str) -> str:
    text = io.StringIO(newline="")
    # the writer leaves a CR bare, where all readers end a line
    quoting = csv.QUOTE_ALL if any("\r" in cell for row in rows for cell in row) else 0
    csv.writer(text, delimiter=separator, lineterminator=end, quoting=quoting).writerows(rows)
    return text.getvalue()


@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS.filter(str.strip))),
    st.sampled_from(",\t;|"),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_any_table_in_text_is_read_as_it_was_written(
    rows: list[tuple[str, str, str]], separator: str, end: str, encoding: str
) -> None:
    header = ["id", "a note", "prompt"]
    text = csv_of([header, *map(list, rows)], separator, end)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table.csv")
        path.write_bytes(text.encode(encoding))
        with closing(open_source(path)) as source:
            found = list(source.records())
            assert source.count() == len(rows)
    assert [record.error for record in found] == [None] * len(rows)
    assert [list(record.shown) for record in found] == [header] * len(rows)
    assert [[cell or "" for cell in record.shown.values()] for record in found] == [
        list(row) for row in rows
    ]


@pytest.mark.parametrize("name", ["table.csv", "table", "table.jsonl", "table.txt", "-"])
def test_a_table_is_told_by_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('id;prompt;note\n7;"a; ""b""\n\nc";\n\n008;d;0.50\n')
    first, second = records_of(path)
    assert first.shown == {"id": "7", "prompt": 'a; "b"\n\nc', "note": None}
    assert second.shown == {"id": "008", "prompt": "d", "note": "0.50"}
    assert (first.number, second.number) == (2, 6)


def test_a_name_says_what_parts_cells(tmp_path: Path) -> None:
    for suffix, separator in (("tsv", "\t"), ("psv", "|")):
        path = tmp_path / f"table.{suffix}.gz"
        path.write_bytes(
            gzip.compress(f"prompt, in short{separator}n, m\na, b{separator}c\n".encode())
        )
        assert [record.read for record in records_of(path)] == [
            {"prompt, in short": "a, b", "n, m": "c"}
        ]


def test_a_line_that_begins_like_an_array_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for first in ("[INFO] loaded", '["a", "b"]', "[1]"):
        path.write_text(first + '\n{"prompt": "a"}\n{"prompt": "b"}\n')
        wrong, *rest = records_of(path)
        assert wrong.error is not None
        assert [record.read for record in rest] == [{"prompt": "a"}, {"prompt": "b"}]


def test_cells_that_are_fields_are_read_and_shown_as_they_came(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    names = ["prompt", "max_tokens", "temperature", "ignore_eos", "stop", "seed", "messages"]
    cells = ["5", "7.0", " 0.50", "TRUE", "5", "x", '[{"role": "user", "content": "a"}]']
    path.write_text(csv_of([names, cells], ",", "\n"))
    (record,) = records_of(path)
    assert record.shown == dict(zip(names, cells, strict=True))
    message = {"role": "user", "content": "a"}
    assert list(record.read.values()) == ["5", 7, 0.5, True, "5", "x", [message]]
    assert isinstance(record.read["max_tokens"], int)
    path.write_text(csv_of([["prompt", "stop"], ["a", '["b", "c"]']], ",", "\n"))
    assert records_of(path)[0].read["stop"] == ["b", "c"]


def test_a_wrong_row_of_a_table_is_one_wrong_row(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b'prompt,n\na,1\nb\nc,2,3\n"d"e,4\nf\xff,5\n"g\nh",6\n"i\n"j,7\nk,8\n')
    found = [
        (record.number, str(record.error) if record.error else record.shown["prompt"])
        for record in records_of(path)
    ]
    assert found == [
        (2, "a"),
        (3, "has 1 cells, where the header has 2"),
        (4, "has 3 cells, where the header has 2"),
        (5, "not CSV: ',' expected after '\"'"),
        (6, "not UTF-8, nor UTF-16 or UTF-32"),
        (7, "g\nh"),
        (9, "(with the 1 lines after it) not CSV: ',' expected after '\"'"),
        (11, "k"),
    ]


def test_a_cell_of_any_length_is_read_or_one_wrong_row(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"prompt,n\n{'a' * 2**20},1\n{'b' * (MAX_LINE_BYTES + 5)},2\nc,3\n")
    first, second, third = records_of(path)
    assert first.shown == {"prompt": "a" * 2**20, "n": "1"}
    assert "longer than" in str(second.error)
    assert third.shown == {"prompt": "c", "n": "3"}


@pytest.mark.parametrize("rest", ["", f"{'d' * 1000},2\n" * 20_000], ids=["short", "long"])
def test_a_quote_that_is_never_closed_is_told_and_swallows_nothing(
    tmp_path: Path, rest: str
) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f'prompt,n\na,1\nb,"c\n{rest}')
    rows, told = rows_before_the_error(path)
    assert rows == [{"prompt": "a", "n": 1}]
    assert "has a quote in the row of line 3 that isn't closed" in told


def test_names_of_columns_that_are_there_twice_are_told(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("prompt,n,prompt\na,1,b\n")
    assert "has the column 'prompt' twice" in rows_before_the_error(path)[1]


def test_one_line_is_no_table_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("red,green\n")
    assert [record.read for record in records_of(path)] == [{"prompt": "red,green"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("prompt,n\n")
    assert [record.error is not None for record in records_of(path)] == [True]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_of_text_is_a_prompt(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "prompts.txt"
    lines = ["[INST] é, and so on", "", ' {"not": json}', "a\tb "]
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    found = records_of(path)
    assert [record.read for record in found] == [{"prompt": line} for line in lines if line]
    assert [record.number for record in found] == [1, 3, 4]


@pytest.mark.parametrize(
    "content", ['{"prompt": "a"}\n', '[\n{"prompt": "a"}]', "id,prompt\n1,a\n"]
)
def test_text_that_is_something_else_is_not_asked_line_by_line(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    assert [record.read["prompt"] for record in records_of(path)] == ["a"]


# -------------------------------------------------------------------------------- Parquet, Arrow

TABLE = pyarrow.table(
    {
        "id": pyarrow.array(range(3000), pyarrow.int32()),
        "prompt": pyarrow.array([f"é {i}" for i in range(3000)], pyarrow.large_string()),
        "kind": pyarrow.array([f"k{i % 3}" for i in range(3000)]).dictionary_encode(),
        "x": pyarrow.array([None if i % 5 else i / 3 for i in range(3000)]),
        "turns": [[{"role": "user", "n": [i, None]}] * (i % 3) for i in range(3000)],
    }
)


def write_parquet(table: pyarrow.Table, path: Path) -> None:
    pyarrow.parquet.write_table(table, path, row_group_size=700)


def write_file(table: pyarrow.Table, path: Path) -> None:
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=700)


def write_stream(table: pyarrow.Table, path: Path) -> None:
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=700)


WRITE = {"parquet": write_parquet, "file": write_file, "stream": write_stream}


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_table_is_read_as_pyarrow_reads_it(tmp_path: Path, kind: str, is_packed: bool) -> None:
    path = tmp_path / "rows.jsonl"
    WRITE[kind](TABLE, path)
    if is_packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    with closing(open_source(path)) as source:
        for _ in range(2):
            records = list(source.records())
            assert [record.shown for record in records] == TABLE.to_pylist()
            assert [record.read for record in records] == TABLE.to_pylist()
            assert [record.number for record in records] == list(range(1, 3001))
        assert source.count() == 3000
        assert source.place(7) == "row 7"
        assert source.schema() == TABLE.schema
    WRITE[kind](TABLE.slice(0, 0), path)
    assert records_of(path) == []


@pytest.mark.parametrize("kind", WRITE)
def test_a_table_that_was_cut_off_is_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows"
    WRITE[kind](TABLE, path)
    whole = path.read_bytes()
    for size in (30, len(whole) // 2, len(whole) - 12, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:size])
        rows, told = rows_before_the_error(path)
        assert rows == TABLE.to_pylist()[: len(rows)]
        assert told.startswith(str(path))


def test_of_damaged_parquet_the_rows_before_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    table = pyarrow.table({"prompt": [f"{i} {i * 7919 % 104729}" for i in range(3000)]})
    pyarrow.parquet.write_table(
        table, path, row_group_size=700, use_dictionary=False, compression="gzip"
    )
    content = bytearray(path.read_bytes())
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0)
    content[group.data_page_offset + group.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(content)
    rows, told = rows_before_the_error(path)
    assert rows == table.to_pylist()[: len(rows)]
    assert len(rows) >= 1024
    assert "is damaged Parquet" in told


@pytest.mark.parametrize(
    "row",
    [
        {"\ud800": 1, "b": "é"},
        {"a": "\ud83d", "b": {"\udfff": ["é"]}},
        {"a": RawJson("1.10"), "b": "\ud800"},
    ],
)
def test_half_a_surrogate_pair_is_written_as_json_says_it(row: dict[str, Any]) -> None:
    read = json.loads(dump_row(row).decode())
    assert read == {**row, **({"a": 1.1} if isinstance(row.get("a"), RawJson) else {})}


@pytest.mark.parametrize("kind", WRITE)
def test_values_come_as_json_can_say_them(tmp_path: Path, kind: str) -> None:
    at = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
    columns = {
        "decimal": (pyarrow.array([Decimal("12.30")], pyarrow.decimal128(9, 2)), "12.30"),
        "decimals": (
            pyarrow.array([[Decimal("0.10"), None]], pyarrow.list_(pyarrow.decimal128(9, 2))),
            "[0.10, null]",
        ),
        "at": (pyarrow.array([at]), '"2024-05-06T07:08:09.123456+00:00"'),
        "ns": (
            pyarrow.array([1715000000000000001], pyarrow.timestamp("ns")),
            '"2024-05-06 12:53:20.000000001"',
        ),
        "us": (
            pyarrow.array([1715000000000000000], pyarrow.timestamp("ns")),
            '"2024-05-06T12:53:20"',
        ),
        "day": (pyarrow.array([date(2024, 5, 6)]), '"2024-05-06"'),
        "took": (pyarrow.array([timedelta(seconds=1.5)]), "1.5"),
        "took_ns": (pyarrow.array([1_500_000_001], pyarrow.duration("ns")), "1.500000001"),
        "bytes": (pyarrow.array([b"\xff\0"]), '{"base64":"/wA="}'),
        "text": (pyarrow.array(["é".encode()]), '"é"'),
        "nan": (pyarrow.array([float("nan")]), "null"),
        "map": (
            pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int8())),
            '{"a":1}',
        ),
        "numbers": (
            pyarrow.array([[(1, 2)]], pyarrow.map_(pyarrow.int8(), pyarrow.int8())),
            "[[1,2]]",
        ),
        "large": (pyarrow.array([2**64 - 1], pyarrow.uint64()), str(2**64 - 1)),
    }
    path = tmp_path / "rows"
    WRITE[kind](pyarrow.table({name: array for name, (array, _) in columns.items()}), path)
    (record,) = records_of(path)
    assert record.error is None, record.error
    shown = {name: dump_row({"v": value}).decode() for name, value in record.shown.items()}
    assert shown == {name: f'{{"v":{text}}}\n' for name, (_, text) in columns.items()}
    assert record.read["decimal"] == 12.3


def test_a_value_that_json_cannot_say_is_one_wrong_row(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        pyarrow.array([b"a", b"\xff", b"c"]).buffers(),
    )
    write_stream(
        pyarrow.table({"id": [1, 2, 3], "prompt": bad, "x": [1.0, 2.0, float("inf")]}), path
    )
    first, second, third = records_of(path)
    assert first.read == {"id": 1, "prompt": "a", "x": 1.0}
    assert (second.read, str(second.error)) == (
        {"id": 2, "x": 2.0},
        "column 'prompt' has a text that isn't UTF-8",
    )
    assert (third.read, str(third.error)) == (
        {"id": 3, "prompt": "c"},
        "column 'x' has inf, which isn't a number that JSON knows",
    )


def test_a_large_row_group_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    num_rows, each = 40_000, 2000
    schema = pyarrow.schema([("prompt", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        rows = [f"{i:0{each}d}" for i in range(num_rows)]
        writer.write_table(pyarrow.table({"prompt": rows}), row_group_size=num_rows)
    del rows
    pool = pyarrow.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    tracemalloc.start()
    try:
        with closing(open_source(path)) as source:
            for number, record in enumerate(source.records()):
                assert record.read["prompt"] == f"{number:0{each}d}"
                most = max(most, pool.bytes_allocated() - before)
        assert tracemalloc.get_traced_memory()[1] < num_rows * each / 4
    finally:
        tracemalloc.stop()
    assert most < num_rows * each / 4
