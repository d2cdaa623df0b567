"""What the queue costs a worker that answers 200 requests a second.

`python -m benchmarks.job_queue.worker_cost URL SECONDS RESULT.json` is the worker; `measure` starts
it. Its engine steps 50 times a second and completes some requests at each step, as a real one does.
Cost: the CPU time of the process less that of the engine's calls, over the wall time between the
first step and the last.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from batchmill import Client, QueueSettings
from benchmarks.children import environment, module
from benchmarks.job_queue.child import make_prompts
from queue_api.connection.connect import connect
from queue_api.connection.embedded import EmbeddedRedis
from workers.running.echo_engine import EchoCompletion, EchoEngine
from workers.settings import WorkerSettings
from workers.worker import BatchWorker

__all__ = ["measure"]

STEP_S = 0.02
MOST_TOKENS = 20
REQUESTS_PER_S = 200
SEQS = round(REQUESTS_PER_S * STEP_S * (MOST_TOKENS + 1) / 2)


class MeteredEngine(EchoEngine):
    """Notes what its steps cost, and the process, from the first step on."""

    def __init__(self) -> None:
        super().__init__(tokens=MOST_TOKENS, max_num_seqs=SEQS)
        self._next = 0.0
        self._first: tuple[float, float] | None = None
        self.own_cpu_s = 0.0
        self.num_done = 0
        self.wall_s = self.cpu_s = 0.0

    def add(self, *args: Any, **kwargs: Any) -> None:
        before = time.thread_time()
        super().add(*args, **kwargs)
        if self._first is not None:
            self.own_cpu_s += time.thread_time() - before

    def step(self) -> list[EchoCompletion]:
        # to the beat, so that the rate holds whatever the step itself takes
        now = time.perf_counter()
        self._next = max(self._next + STEP_S, now)
        time.sleep(self._next - now)
        if self._first is None:
            self._first = (time.perf_counter(), time.process_time())
        before = time.thread_time()
        done = super().step()
        self.own_cpu_s += time.thread_time() - before
        self.num_done += len(done)
        self.wall_s = time.perf_counter() - self._first[0]
        self.cpu_s = time.process_time() - self._first[1]
        return done


def measure(seconds: float, chunk_size: int = 32) -> dict[str, Any]:
    """Per chunk size: requests/s, and the queue's share of one core."""
    count = int(REQUESTS_PER_S * seconds)
    draw = random.Random(0)
    requests = [
        {"prompt": prompt, "max_tokens": draw.randint(1, MOST_TOKENS)}
        for prompt in make_prompts(count)
    ]

    async def submit_and_wait(url: str) -> None:
        settings = QueueSettings(redis_url=url, chunk_size=chunk_size)
        async with Client(settings=settings) as client:
            await (await client.submit(requests, "cost")).wait()

    with EmbeddedRedis() as server, tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        command = module("benchmarks.job_queue.worker_cost", server.url, result)
        worker = subprocess.Popen(command, env=environment())
        try:
            asyncio.run(submit_and_wait(server.url))
        finally:
            worker.terminate()
            worker.wait(30)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return {"chunk_size": chunk_size, **found}


def main() -> None:
    url, result = sys.argv[1:]
    engine = MeteredEngine()
    settings = WorkerSettings(redis_url=url, model="echo:", max_num_seqs=SEQS)
    BatchWorker(settings, engine, connect(url)).serve()
    found = {
        "requests": engine.num_done,
        "requests_per_s": engine.num_done / engine.wall_s,
        "queue_share": (engine.cpu_s - engine.own_cpu_s) / engine.wall_s,
        "queue_us_per_request": (engine.cpu_s - engine.own_cpu_s) / engine.num_done * 1e6,
    }
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
