"""Parquet as an output is one table to whatever reads it."""

from __future__ import annotations

import json
import math
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.sink_kit import Kind, Rows, made

from queue_api.datasets.formats.arrow_columns import ArrowColumns, as_text
from queue_api.datasets.formats.output_options import OutputOptions
from queue_api.datasets.formats.record import RawJson

KIND = Kind(
    "out.parquet", lambda path: pq.read_table(path).to_pylist(), OutputOptions(part_rows=10)
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def written(folder: Path, *batches: Rows, **options: Any) -> tuple[Path, list[str]]:
    """The columns as an output, and what was told of them."""
    told: list[str] = []
    number = 0
    sink = KIND.open(folder, warn=told.append, **options)
    for batch in batches:
        sink.append([made(number + i, **columns) for i, columns in enumerate(batch)])
        number += len(batch)
    sink.finish()
    sink.close()
    return KIND.path(folder), told


def column(path: Path, name: str) -> list[Any]:
    table = pq.read_table(path).sort_by("row")
    return list(table[name].to_pylist())


def test_parts_have_the_rows_asked_for_and_one_schema(tmp_path: Path) -> None:
    path, told = written(
        tmp_path,
        [{"x": None, "s": {"a": 1}}] * 15,
        [{"x": 1, "s": {"b": "t"}}] * 9,
        [{"x": 0.5}] * 8,
    )
    files = sorted(path.iterdir())
    assert [file.name for file in files] == [f"part-{i:05}.parquet" for i in range(4)]
    assert [pq.read_metadata(file).num_rows for file in files] == [10, 10, 10, 2]
    assert len({str(pq.read_schema(file)) for file in files}) == 1
    assert column(path, "x") == [None] * 15 + [1.0] * 9 + [0.5] * 8
    assert column(path, "s")[14:16] == [{"a": 1, "b": None}, {"a": None, "b": "t"}]
    assert told == []


def test_what_one_type_cannot_hold_is_text_and_told_once(tmp_path: Path) -> None:
    mixed = [{"x": "a"}] * 12 + [{"x": 5}] * 12 + [{"x": [1, "b"]}, {"x": "c"}]
    path, told = written(tmp_path, mixed[:11], mixed[11:20], mixed[20:])
    assert len(told) == 1
    assert "column 'x'" in told[0]
    assert column(path, "x") == ["a"] * 12 + ["5"] * 12 + ['[1, "b"]', "c"]


@pytest.mark.parametrize(
    "values",
    [
        [1, 1.5],
        [2**60 + 1, 0.5],
        [0.5, 2**60 + 1],
        [2**70],
        [{"a": 1}, {"a": 1, "b": 2}],
        [{"a": 1, "b": 2}, {"a": 1}],
        [{"a": "x"}, {"a": 1}],
        [{}, {}],
        [{}, {"a": 1}],
        [[], [None], [1], [1.5]],
        [True, 1],
        [True, 0.5],
        [[True], [0.5]],
        [{"a": 0.5}, {"a": True}],
        [1, True],
        ["2020-01-01", "x"],
        [{str(i): i for i in range(1000)}],
        [[[[[1]]]], [[[["a"]]]]],
        [1, {"a": 1}],
        [[1], {"a": 1}],
    ],
)
def test_no_value_is_cut_without_a_word(tmp_path: Path, values: list[Any]) -> None:
    """Each in a part of its own, so that those before it had a narrower schema, and all in one."""
    apart, together = tmp_path / "apart", tmp_path / "together"
    apart.mkdir()
    together.mkdir()
    path, _ = written(apart, *([{"x": value}] * 10 for value in values))
    found = column(path, "x")[::10]
    path, _ = written(together, [{"x": value} for value in values])
    for value, first, second in zip(values, found, column(path, "x"), strict=True):
        assert same(value, first), (value, first)
        assert same(value, second), (value, second)


def same(value: Any, read: Any) -> bool:
    """Whether what is read says the value: as it is, with nulls for keys that it lacks, or as
    text."""
    if isinstance(value, dict) and isinstance(read, dict):
        return all(same(value.get(key), read.get(key)) for key in {*value, *read})
    if isinstance(value, list) and isinstance(read, list):
        return len(value) == len(read) and all(map(same, value, read))
    if isinstance(read, str) and not isinstance(value, str):
        return same(value, json.loads(read))
    if isinstance(value, float) and isinstance(read, float):
        return math.isclose(value, read, rel_tol=0) or value == read
    return bool(value == read and isinstance(value, bool) == isinstance(read, bool))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(JSON_VALUES, min_size=1, max_size=4), min_size=1, max_size=4))
def test_whatever_comes_is_in_the_table(parts: list[list[Any]]) -> None:
    columns = ArrowColumns(warn=lambda _: None)
    tables = []
    for part in parts:
        lines = b"".join(json.dumps({"x": value}).encode() + b"\n" for value in part)
        tables.append(columns.table(lines))
    whole = columns.joined(tables)
    for value, read in zip(chain(*parts), whole["x"].to_pylist(), strict=True):
        assert same(value, read), (value, read, columns.schema)


def test_the_types_of_the_source_stand_where_values_fit(tmp_path: Path) -> None:
    source = pa.schema(
        [
            ("n", pa.int32()),
            ("f", pa.float32()),
            ("at", pa.timestamp("us")),
            ("u", pa.uint64()),
            ("dec", pa.decimal128(30, 2)),
            ("gone", pa.string()),
        ]
    )
    digits = "12345678901234567890.10"
    row = {"n": 1, "f": 0.5, "at": "2020-01-02 03:04:05", "u": 2**63 + 1}
    rows = [{**row, "dec": RawJson(digits)}] * 12
    path, told = written(tmp_path, rows, schema=lambda: source)
    schema = pq.read_schema(path / "part-00000.parquet")
    assert [schema.field(name).type for name in source.names[:-1]] == list(source.types[:-1])
    assert "gone" not in schema.names
    assert str(column(path, "dec")[11]) == digits
    assert column(path, "u") == [2**63 + 1] * 12
    assert str(column(path, "at")[0]) == "2020-01-02 03:04:05"
    assert told == []


def test_an_object_with_a_key_twice_is_text_and_keeps_both(tmp_path: Path) -> None:
    path, _ = written(tmp_path, [{"x": RawJson('{"a": 1, "a": 2}')}, {"x": {"a": 3}}])
    assert column(path, "x") == ['{"a": 1, "a": 2}', '{"a": 3}']


def test_columns_without_a_value_break_nothing(tmp_path: Path) -> None:
    path, told = written(tmp_path, [{"x": None, "y": []}] * 25)
    assert column(path, "error").count("") == 22
    assert column(path, "x") == [None] * 25
    assert told == []


def test_what_people_use_reads_the_folder_as_one_table(tmp_path: Path) -> None:
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    datasets = pytest.importorskip("datasets")
    path, _ = written(tmp_path, [{"x": None}] * 15, [{"x": {"a": 1}}] * 15, [{"x": {"b": [1]}}])
    assert pandas.read_parquet(path).shape[0] == 31
    assert polars.read_parquet(path).shape[0] == 31
    assert polars.scan_parquet(path).select("x").collect().shape == (31, 1)
    assert pyarrow.dataset.dataset(path).to_table().num_rows == 31
    loaded = datasets.load_dataset(
        "parquet", data_files=str(path / "*.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert loaded["train"].num_rows == 31


def test_an_ended_run_leaves_nothing_beside_the_folder(tmp_path: Path) -> None:
    sink = KIND.open(tmp_path)
    sink.append([made(0), made(1)])
    assert KIND.rows(tmp_path) == []  # they are in the journal
    sink.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.parquet"]
    assert KIND.rows(tmp_path) == [0, 1]
    again = KIND.open(tmp_path)
    again.append([made(row) for row in range(2, 12)])
    again.close()
    assert [
        pq.read_metadata(file).num_rows for file in sorted((tmp_path / "out.parquet").iterdir())
    ] == [10, 2]


def test_what_is_complete_is_not_written_again(tmp_path: Path) -> None:
    rows = [{"x": [{"a": 1}], "y": None}] * 23
    path, _ = written(tmp_path, rows)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    for _ in range(2):
        sink = KIND.open(tmp_path)
        sink.finish()
        sink.close()
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before
    sink = KIND.open(tmp_path)
    sink.append([made(row, x=[{"a": 2}], y=None) for row in range(23, 45)])
    sink.finish()
    sink.close()
    after = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    first_two = sorted(before)[:2]
    assert {name: after[name] for name in first_two} == {name: before[name] for name in first_two}
    assert column(path, "x")[22:24] == [[{"a": 1}], [{"a": 2}]]


def test_an_output_that_was_removed_does_not_come_back(tmp_path: Path) -> None:
    sink = KIND.open(tmp_path)
    sink.append([made(0), made(1)])
    del sink  # as a kill leaves it: two rows in the journal
    shutil.rmtree(tmp_path / "out.parquet")
    again = KIND.open(tmp_path)
    assert again.rows == 0
    again.append([made(5)])
    again.close()
    assert KIND.rows(tmp_path) == [5]


def test_text_of_a_value() -> None:
    assert [as_text(v) for v in (None, "a", 5, {"é": 1})] == [None, "a", "5", '{"é": 1}']
