"""Rows per second into each format of outputs, beside pyarrow's own copy of the same Parquet.

Rows are made beforehand; what is measured is a sink's: making them durable, and the last form.
`python benchmarks/output_formats.py --rows 200000`
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import parquet

from queue_api.datasets.columns import output_row
from queue_api.datasets.formats.output_opening import open_sink
from queue_api.datasets.formats.row_sink import MadeRow
from queue_api.wire.schemas import GenerationResult

BATCH_ROWS = 512
NAMES = ("out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.parquet")


def rows(count: int) -> Iterator[dict[str, Any]]:
    for row in range(count):
        result = GenerationResult(
            id=str(row),
            index=row,
            text=f"the answer to question {row} is {row * 7919 % 100_003}",
            finish_reason="stop",
            prompt_tokens=12,
            completion_tokens=16,
            model="echo",
            model_revision="1",
            worker="worker-1",
        )
        columns = {"id": f"q{row}", "prompt": f"what is {row} times 7919?", "level": row % 5}
        yield output_row(columns, result, f"{row:016x}")


Times = tuple[float, float]
"""Seconds that pass, and those of a CPU: the first has the disk's and the neighbours', too."""


def clocks() -> Times:
    return time.perf_counter(), time.process_time()


def since(began: Times) -> Times:
    passed, cpu = clocks()
    return passed - began[0], cpu - began[1]


def measure(folder: Path, name: str, count: int) -> Times:
    """What the sink took."""
    sink, spent = open_sink(folder / name), (0.0, 0.0)
    held: list[MadeRow] = []
    for index, row in enumerate(rows(count)):
        held.append(MadeRow(index, row["fingerprint"], row))
        if len(held) == BATCH_ROWS or index == count - 1:
            began = clocks()
            sink.append(held)
            passed, cpu = since(began)
            spent = spent[0] + passed, spent[1] + cpu
            held = []
    began = clocks()
    sink.finish()
    sink.close()
    passed, cpu = since(began)
    return spent[0] + passed, spent[1] + cpu


def copy(folder: Path) -> Times:
    """What pyarrow takes to read those parts and write them, part by part."""
    began = clocks()
    (folder / "copy.parquet").mkdir()
    for part in sorted((folder / "out.parquet").iterdir()):
        table = parquet.read_table(part)
        parquet.write_table(table, folder / "copy.parquet" / part.name, compression="zstd")
    return since(began)


def tell(name: str, spent: Times, count: int) -> None:
    passed, cpu = (seconds / count * 1e6 for seconds in spent)
    print(f"{name:14} {1e6 / passed:9,.0f} rows/s  {passed:5.1f} us a row, {cpu:5.1f} of a CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    count = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for output in NAMES:
            tell(output, measure(folder, output, count), count)
        tell("pyarrow's copy", copy(folder), count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
