"""One system in one process against an empty Redis: `python -m benchmarks.job_queue.child JOB`.

It may be the peer's own Python, so nothing of batchmill is imported unless it is the system.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis

WARM_UP = 200
PROMPT_WORDS = 60


def make_prompts(count: int) -> list[str]:
    """Some 400 characters each; words from a vocabulary, so that they compress as text does."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(draw.choices(letters, k=draw.randint(2, 10))) for _ in range(4000)]
    return [" ".join(draw.choices(vocabulary, k=PROMPT_WORDS)) for _ in range(count)]


class Meter:
    """Times phases, and what they cost the server."""

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(url)
        self.memory_before = self.memory()
        self.redis_cpu_s = 0.0

    def memory(self) -> int:
        return self._redis.info("memory")["used_memory"]

    def _cpu(self) -> float:
        info = self._redis.info("cpu")
        return info["used_cpu_user"] + info["used_cpu_sys"]

    def time(self, phase: Callable[[], Any]) -> tuple[float, Any]:
        cpu = self._cpu()
        started_at = time.perf_counter()
        returned = phase()
        elapsed_s = time.perf_counter() - started_at
        self.redis_cpu_s += self._cpu() - cpu
        return elapsed_s, returned


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Warm up, then measure each phase once."""
    prompts = make_prompts(job["num_requests"])
    measure(job, prompts[:WARM_UP])
    return measure(job, prompts)


def measure(job: dict[str, Any], prompts: list[str]) -> dict[str, Any]:
    module = importlib.import_module(f"benchmarks.job_queue.systems.{job['module']}")
    redis.Redis.from_url(job["url"]).flushall()
    system = module.System(job["url"], **job["settings"])
    count = len(prompts)
    meter = Meter(job["url"])
    enqueue_s, _ = meter.time(lambda: system.enqueue(prompts))
    queued_bytes = meter.memory() - meter.memory_before
    work_s, own_s = meter.time(lambda: system.work(count))
    finished_bytes = meter.memory() - meter.memory_before
    results_s, texts = meter.time(lambda: system.results(count))
    system.close()
    if texts != [prompt.split(None, 1)[0] for prompt in prompts]:
        raise RuntimeError(f"{len(texts)} answers for {count} prompts, or wrong ones")
    return {
        "enqueue_s": enqueue_s,
        "work_s": own_s or work_s,
        "results_s": results_s,
        "redis_cpu_s": meter.redis_cpu_s,
        "queued_bytes": queued_bytes,
        "finished_bytes": finished_bytes,
    }


def probe(job: dict[str, Any]) -> dict[str, Any]:
    """The version of what is needed; fails if it can't be imported."""
    importlib.import_module(f"benchmarks.job_queue.systems.{job['module']}")
    names = [job["distribution"], "redis"]
    return {name: importlib.metadata.version(name) for name in names}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = {"run": run, "probe": probe}[job["action"]](job)
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
