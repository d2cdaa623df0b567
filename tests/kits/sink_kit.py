"""The kinds of outputs, and what each test of them needs: rows to write, and another's way to read
them."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from queue_api.datasets.columns import output_row
from queue_api.datasets.formats.output_opening import open_sink
from queue_api.datasets.formats.output_options import OutputOptions
from queue_api.datasets.formats.row_sink import MadeRow, RowSink
from queue_api.wire.schemas import ErrorDetail, GenerationResult

Rows = list[dict[str, Any]]


def made(row: int, text: str | None = None, **columns: Any) -> MadeRow:
    """Row as a run would write it; each seventh has an error."""
    error = ErrorDetail(code="invalid_request", message="wrong") if row % 7 == 6 else None
    result = GenerationResult(
        id=str(row),
        index=row,
        text="" if error else (text if text is not None else f"text {row} é\n"),
        finish_reason="error" if error else "stop",
        prompt_tokens=3,
        completion_tokens=2,
        model="" if error else f"model-{row % 2}",
        model_revision="" if error else "rev",
        error=error,
    )
    made_of = {"id": row, "prompt": f"prompt {row}", "note": [row], **columns}
    return MadeRow(row, f"{row:016x}", output_row(made_of, result, f"{row:016x}"), row + 1)


def lines_of(content: bytes) -> Rows:
    return [json.loads(line) for line in content.splitlines()]


def _unzstd(path: Path) -> bytes:
    return subprocess.run(["zstd", "-dc", path], capture_output=True, check=True).stdout


def _of_datasets(path: Path) -> Rows:
    datasets = pytest.importorskip("datasets")
    return list(datasets.load_from_disk(str(path)).to_list())


def _of_batch(path: Path) -> Rows:
    errors = Path(f"{path}.errors.jsonl").read_bytes()
    found = lines_of(path.read_bytes()) + lines_of(errors)
    return [line["batchmill"] for line in found]


def _of_two(path: Path) -> Rows:
    apart = lines_of((path.parent / "errors.jsonl").read_bytes())
    assert all(row["error"] for row in apart)
    main = pq.read_table(path).to_pylist() if path.suffix == ".parquet" else None
    return apart + (lines_of(path.read_bytes()) if main is None else main)


def _of_copied(path: Path) -> Rows:
    rows = lines_of(path.read_bytes())
    copies = lines_of((path.parent / "errors.jsonl").read_bytes())
    wrong = sorted(row["row"] for row in rows if row["error"])
    assert sorted(row["row"] for row in copies) == wrong
    return rows


PLAIN = OutputOptions()


@dataclass(frozen=True)
class Kind:
    """An output in one format, and how others read it."""

    name: str
    read: Callable[[Path], Rows]
    options: OutputOptions = PLAIN

    def open(self, folder: Path, **options: Any) -> RowSink:
        wanted = self.options
        if wanted.errors is not None:
            wanted = replace(wanted, errors=str(folder / wanted.errors))
        return open_sink(self.path(folder), wanted, **options)

    def path(self, folder: Path) -> Path:
        return folder / self.name

    def rows(self, folder: Path) -> list[int]:
        """The numbers of its rows, sorted."""
        return sorted(row["row"] for row in self.read(self.path(folder)))

    def __str__(self) -> str:
        return self.name


LINES = [
    Kind("out.jsonl", lambda path: lines_of(path.read_bytes())),
    Kind("out.jsonl.gz", lambda path: lines_of(gzip.decompress(path.read_bytes()))),
    Kind("out.jsonl.zst", lambda path: lines_of(_unzstd(path))),
]
PARTS = [
    Kind("out.parquet", lambda path: pq.read_table(path).to_pylist(), OutputOptions(part_rows=37)),
    Kind("out", _of_datasets, OutputOptions("datasets", part_rows=37)),
]
PAIRS = [
    Kind("out.batch.jsonl", _of_batch, OutputOptions("openai")),
    Kind("apart.jsonl", _of_two, OutputOptions(errors="errors.jsonl", errors_only_apart=True)),
    Kind("apart.parquet", _of_two, OutputOptions(errors="errors.jsonl", errors_only_apart=True)),
    Kind("copied.jsonl", _of_copied, OutputOptions(errors="errors.jsonl")),
]
KINDS = [*LINES, *PARTS, *PAIRS]


def kill_while(work: Callable[..., None], *args: Any, within_s: float, seed: int) -> None:
    """Start work in another process and kill that at a random instant."""
    child = multiprocessing.get_context("fork").Process(target=work, args=args)
    child.start()
    child.join(random.Random(seed).uniform(0, within_s))
    if child.is_alive():
        os.kill(child.pid or 0, signal.SIGKILL)
    child.join()


def write_until_killed(
    kind: Kind, folder: Path, wanted: Collection[int], seed: int, ack: int
) -> None:
    """Append what is missing of the rows in batches, and say on `ack` what is on disk."""
    draw = random.Random(seed)
    sink = kind.open(folder)
    missing = [row for row in wanted if row not in sink]
    draw.shuffle(missing)
    while missing:
        size = draw.randint(1, 9)
        batch, missing = missing[:size], missing[size:]
        sink.append([made(row) for row in batch])
        os.write(ack, b"".join(row.to_bytes(4, "big") for row in batch))
    sink.close()
    os._exit(0)
