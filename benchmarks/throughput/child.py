"""One engine in one process: pinned, loaded, warmed up, timed once. Reads a job, writes a result.

`python -m benchmarks.throughput.child JOB.json`, started by `rounds`. It may be the peer's own
Python, so nothing outside the standard library is imported before the runner asks for it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.throughput.models import MODELS
from benchmarks.throughput.workload import Workload


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, generate. Times are wall seconds; memory is this process's alone."""
    workload = Workload.load(Path(job["workload"]))
    started = time.perf_counter()
    module = importlib.import_module(f"benchmarks.throughput.engines.{job['module']}")
    converted = Path(job["converted"]) if job["converted"] else None
    runner = module.Runner(Path(job["model"]), converted, job["threads"], **job["settings"])
    loaded_s = time.perf_counter() - started
    loaded_bytes = _memory("VmRSS")
    warm_up = workload.warm_up()
    runner.generate(warm_up.prompts, warm_up.outputs)
    cpu_started = time.process_time()
    started = time.perf_counter()
    tokens = runner.generate(workload.prompts, workload.outputs)
    elapsed_s = time.perf_counter() - started
    cpu_s = time.process_time() - cpu_started
    peak_bytes = _memory("VmHWM")
    if hasattr(runner, "close"):
        runner.close()
    return {
        "load_s": loaded_s,
        "elapsed_s": elapsed_s,
        "cpu_s": cpu_s,
        "loaded_bytes": loaded_bytes,
        "peak_bytes": peak_bytes,
        "output_tokens": sum(map(len, tokens)),
        "tokens": tokens,
    }


def convert(job: dict[str, Any]) -> dict[str, Any]:
    """Write the model in the engine's own format."""
    module = importlib.import_module(f"benchmarks.throughput.engines.{job['module']}")
    module.convert(Path(job["model"]), Path(job["converted"]))
    return {}


def probe(job: dict[str, Any]) -> dict[str, Any]:
    """Versions of what the engine needs; fails if it can't be imported."""
    for name in job["imports"]:
        importlib.import_module(name)
    return {"versions": {name: importlib.metadata.version(name) for name in job["distributions"]}}


def gemm(job: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.throughput.gemm import measure

    return {"passes": measure(MODELS[job["spec"]], job["threads"])}


def _memory(field: str) -> int:
    """Of /proc/self/status, in bytes. getrusage would count what the parent had before exec."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # Before anything starts a thread: threads inherit the mask.
    if job["cores"]:
        os.sched_setaffinity(0, job["cores"])
    actions = {"run": run, "convert": convert, "probe": probe, "gemm": gemm}
    result = actions[job["action"]](job)
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
    # Some engines' threads don't end; the result is written, so nothing is lost.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
