"""Rows per second, and the most memory of each process, of bulk runs of growing size.

    python -m benchmarks.dataset_size [--rows 10000 100000 1000000] [--formats jsonl parquet]

`batchmill run` with the echo engine, two workers and a private Redis: what is measured is all but a
model. Seconds are those of the rows, as the command's report says them, without its start.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from benchmarks.children import environment, module
from benchmarks.dataset_kills import descendants

LOOK_EVERY_S = 0.1
BATCH_ROWS = 50_000


def batches(count: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, count, BATCH_ROWS):
        numbers = range(start, min(count, start + BATCH_ROWS))
        yield [{"id": n, "prompt": f"a short prompt of row {n}"} for n in numbers]


def write_rows(path: Path, count: int) -> None:
    if path.suffix == ".parquet":
        schema = pyarrow.schema([("id", pyarrow.int64()), ("prompt", pyarrow.string())])
        with parquet.ParquetWriter(path, schema) as writer:
            for batch in batches(count):
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
        return
    with path.open("w") as file:
        for batch in batches(count):
            file.writelines(json.dumps(row) + "\n" for row in batch)


def role_of(pid: int) -> str:
    said = Path(f"/proc/{pid}/cmdline").read_bytes()
    if b"redis" in said or b"valkey" in said:
        return "Redis"
    return "worker" if b"worker" in said.split(b"\0") else "client"


def peak_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def measure(folder: Path, form: str, count: int) -> dict[str, Any]:
    source, output = folder / f"in-{count}.{form}", folder / f"out-{count}.{form}"
    write_rows(source, count)
    report = folder / "report.html"
    command = ["run", source, "-o", output, "--model", "echo:", "--workers", "2"]
    process = subprocess.Popen(
        module("batchmill", *map(str, command), "--max-tokens", "4", "--report", str(report)),
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    peaks: dict[str, float] = {}
    while process.poll() is None:
        for pid in descendants(process.pid):
            try:
                role = role_of(pid)
                peaks[role] = max(peaks.get(role, 0.0), peak_mib(pid))
            except OSError:
                continue  # it has ended
        time.sleep(LOOK_EVERY_S)
    assert process.returncode == 0, f"{form} {count}: {process.returncode}"
    said = json.loads(Path(f"{output}.certificate.json").read_text())
    seconds = json.loads(report.with_suffix(".json").read_text())["elapsed_s"]
    report.unlink()
    is_whole = said["rows"] == [[0, count - 1]] and said["rows_out"] == count
    subprocess.run(module("batchmill", "verify", str(output)), env=environment(), check=True)
    source.unlink()
    return {"whole": is_whole, "rows_per_s": count / seconds, "peaks": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--formats", nargs="+", default=["jsonl", "parquet"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for form in args.formats:
            for count in args.rows:
                found = measure(Path(scratch), form, count)
                peaks = ", ".join(f"{role} {mib:.0f}" for role, mib in found["peaks"].items())
                print(
                    f"{form}: {count:,} rows, each once: {found['whole']}; "
                    f"{found['rows_per_s']:,.0f} rows/s; peak MiB: {peaks}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
