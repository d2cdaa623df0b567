"""Every format of inputs gives the rows that its own library reads; of damaged ones the first."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from queue_api.datasets.formats.opening import open_source
from queue_api.datasets.formats.record import Record
from queue_api.wire.errors import DatasetError

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
