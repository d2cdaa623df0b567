"""The formats of inputs, each with its own library beside it, and what a source of any must do."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import json
import lzma
import os
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.feather
import pyarrow.parquet
from backports import zstd

from queue_api.datasets.formats.opening import Inputs, open_source
from queue_api.wire.errors import DatasetError

Rows = list[dict[str, Any]]


def rows_made(count: int, size: int = 0) -> Rows:
    """Rows with texts that every format has to quote, escape or encode."""
    odd = ["é", "a,b", 'say "no"', "two\nlines", "tab\t|;", "\u2028", "😀"]
    return [
        {
            "id": i,
            "prompt": f"{odd[i % len(odd)]} {i} {'x' * size}",
            "note": None if i % 3 else f"n{i}",
            "turns": [{"role": "user", "n": [i, 0.5]}] * (i % 3),
        }
        for i in range(count)
    ]


@dataclass(frozen=True)
class Format:
    """How a file in it is written and read without us."""

    name: str
    write: Callable[[Rows, Path], object]
    read: Callable[[Path], Rows]
    place: str = "line {}"
    """What the row of that number from 1 is called."""
    tells_its_end: bool = True
    """Whether a file that was cut off can be told from a whole one wherever that was."""

    def input(self, folder: Path) -> Path:
        """Where it is written."""
        return folder / f"rows.{self.name}"


def _to_lines(rows: Rows, encoding: str = "utf-8", end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode(encoding)


def _of_lines(content: bytes, encoding: str = "utf-8") -> Rows:
    return [json.loads(line) for line in content.decode(encoding).split("\n") if line.strip()]


def _lines(name: str, encoding: str, end: str) -> Format:
    return Format(
        name,
        lambda rows, path: path.write_bytes(_to_lines(rows, encoding, end)),
        lambda path: _of_lines(path.read_bytes(), encoding),
        tells_its_end=False,
    )


def _packed(name: str, pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]) -> Format:
    return Format(
        name,
        lambda rows, path: path.write_bytes(pack(_to_lines(rows))),
        lambda path: _of_lines(unpack(path.read_bytes())),
    )


def _json(
    name: str, dump: Callable[[Rows], str], read: Callable[[str], Rows], **more: Any
) -> Format:
    return Format(
        name,
        lambda rows, path: path.write_text(dump(rows)),
        lambda path: read(path.read_text()),
        place="element {}",
        **more,
    )


def _values(text: str) -> Rows:
    decoder, rows, at = json.JSONDecoder(), [], 0
    while at < len(text):
        row, at = decoder.raw_decode(text, at)
        rows.append(row)
        at += 1
    return rows


def _table(name: str, separator: str) -> Format:
    def write(rows: Rows, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "prompt", "note"], delimiter=separator)
            writer.writeheader()
            writer.writerows({k: v for k, v in row.items() if k != "turns"} for row in rows)

    def read(path: Path) -> Rows:
        with path.open(newline="") as file:
            table = csv.DictReader(file, delimiter=separator)
            return [{k: v or None for k, v in row.items()} for row in table]

    return Format(name, write, read, place="", tells_its_end=False)


SCHEMA = pyarrow.schema(
    {
        "id": pyarrow.int64(),
        "prompt": pyarrow.large_string(),
        "note": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "turns": pyarrow.list_(
            pyarrow.struct({"role": pyarrow.string(), "n": pyarrow.list_(pyarrow.float64())})
        ),
    }
)


def _as_table(rows: Rows) -> pyarrow.Table:
    return pyarrow.Table.from_pylist(rows, SCHEMA)


def _write_parquet(rows: Rows, path: Path) -> None:
    pyarrow.parquet.write_table(_as_table(rows), path, row_group_size=700)


def _read_parquet(path: Path) -> Rows:
    return pyarrow.parquet.read_table(path).to_pylist()


def _read_feather(path: Path) -> Rows:
    return pyarrow.feather.read_table(path).to_pylist()


def _write_feather(rows: Rows, path: Path) -> None:
    pyarrow.feather.write_feather(_as_table(rows), path, chunksize=700, compression="lz4")


def _write_stream(rows: Rows, path: Path) -> None:
    table = _as_table(rows)
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=700)


def _read_stream(path: Path) -> Rows:
    with pyarrow.ipc.open_stream(path) as reader:
        return reader.read_all().to_pylist()


def _write_text(rows: Rows, path: Path) -> None:
    path.write_text("".join(f"{row['prompt']}".replace("\n", " ") + "\n" for row in rows))


def _read_text(path: Path) -> Rows:
    return [{"prompt": line} for line in path.read_text().split("\n") if line]


FORMATS = (
    _lines("jsonl", "utf-8", "\n"),
    _lines("utf16.jsonl", "utf-16", "\r\n"),
    _packed("jsonl.gz", gzip.compress, gzip.decompress),
    _packed("jsonl.zst", zstd.compress, zstd.decompress),
    _packed("jsonl.bz2", bz2.compress, bz2.decompress),
    _packed("jsonl.xz", lzma.compress, lzma.decompress),
    _json("json", json.dumps, json.loads),
    _json("indented.json", lambda rows: json.dumps(rows, indent=1), json.loads),
    _json(
        "objects.json",
        lambda rows: "".join(json.dumps(row, indent=1) + "\n" for row in rows),
        _values,
        tells_its_end=False,
    ),
    _table("csv", ","),
    _table("tsv", "\t"),
    Format("txt", _write_text, _read_text, tells_its_end=False),
    Format(
        "parquet",
        _write_parquet,
        lambda path: pyarrow.parquet.read_table(path).to_pylist(),
        "row {}",
    ),
    Format(
        "feather",
        _write_feather,
        lambda path: pyarrow.feather.read_table(path).to_pylist(),
        "row {}",
    ),
    Format("arrow", _write_stream, _read_stream, "row {}"),
)


def read_by_us(inputs: Inputs) -> tuple[Rows, str]:
    """The rows that can be read, and what is told of what can't."""
    rows: Rows = []
    told = ""
    with closing(open_source(inputs)) as source:
        try:
            for record in source.records():
                if record.error is None:
                    rows.append(record.shown)
                told = told or str(record.error or "")
        except DatasetError as error:
            assert source.name in str(error)
            told = str(error)
    return rows, told


def check_rows(kind: Format, path: Path) -> None:
    """The same rows as its own library reads, each time, counted and named."""
    expected = kind.read(path)
    with closing(open_source(path)) as source:
        for _ in range(2):
            records = list(source.records())
            assert [record.error for record in records] == [None] * len(records)
            assert [record.shown for record in records] == expected
            numbers = [record.number for record in records]
            assert numbers == sorted(set(numbers))
        assert source.count() == len(expected)
        assert source.identity() == source.identity()
        if records and kind.place:
            assert source.place(numbers[-1]) == kind.place.format(len(expected))


def check_pipe(kind: Format, path: Path, fifo: Path) -> None:
    """What comes through a pipe is the same, and comes once."""
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(path.read_bytes(),))
    writer.start()
    # the name tells of plain text, which a pipe hasn't
    with closing(open_source(fifo, format="txt" if kind.name == "txt" else None)) as source:
        assert not source.is_repeatable
        rows = [record.shown for record in source.records()]
        assert source.count() is None
    writer.join()
    assert rows == kind.read(path)


def check_cut(kind: Format, path: Path, sizes: Iterator[int]) -> None:
    """Of a file that was cut off the rows before are read, and it is told."""
    expected, whole = kind.read(path), path.read_bytes()
    for size in sizes:
        path.write_bytes(whole[:size])
        rows, told = read_by_us(path)
        if kind.tells_its_end:
            assert told, size
            assert rows == expected[: len(rows)]
        else:  # a last line may be a shorter one that is as good
            assert rows[:-1] == expected[: max(0, len(rows) - 1)]


def check_damage(path: Path, seed: int, times: int) -> None:
    """Whatever becomes of its bytes, a file ends in rows, wrong rows, or an error of ours."""
    choice, whole = random.Random(seed), path.read_bytes()
    for _ in range(times):
        content = bytearray(whole)
        for _ in range(choice.choice([1, 1, 2, 5])):
            _damage(content, choice)
        path.write_bytes(content)
        with contextlib.suppress(DatasetError), closing(open_source(path)) as source:
            for _ in source.records():
                pass
        with contextlib.suppress(DatasetError), closing(open_source(path)) as source:
            source.schema()
            source.count()


def _damage(content: bytearray, choice: random.Random) -> None:
    at, kind = choice.randrange(len(content)), choice.random()
    if kind < 0.5:
        content[at] ^= 1 << choice.randrange(8)
    elif kind < 0.7:
        del content[at : at + choice.randrange(1, 40)]
    elif kind < 0.85:
        content[at:at] = choice.randbytes(choice.randrange(1, 9))
    else:
        content[at : at + 16] = bytes(16)


def most_memory(path: Path) -> int:
    """Bytes of Python's that reading takes at most, when no row is kept."""
    tracemalloc.start()
    try:
        with closing(open_source(path)) as source:
            for _ in source.records():
                pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
