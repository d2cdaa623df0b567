"""A million requests from file to file, in bounded Redis memory."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import redis

from batchmill import Client, QueueSettings, run_dataset
from benchmarks.children import environment, module
from queue_api.connection.connect import connect
from queue_api.connection.embedded import EmbeddedRedis

__all__ = ["measure"]

LOOK_EVERY_S = 0.05
_WORDS = ["anchor", "basket", "cave", "forest", "harbor", "lion", "mirror", "orange", "river"]


def measure(count: int, num_workers: int = 1) -> dict[str, Any]:
    """Rows per second, and the most memory that Redis had in use at any time."""
    with tempfile.TemporaryDirectory() as scratch, EmbeddedRedis() as server:
        source, output = Path(scratch) / "in.jsonl", Path(scratch) / "out.jsonl"
        _write_rows(source, count)
        connection = connect(server.url)
        before = connection.info("memory")["used_memory"]
        settings = environment(BATCHMILL_REDIS_URL=server.url, BATCHMILL_MAX_NUM_SEQS="256")
        workers = [
            subprocess.Popen(
                module("batchmill", "worker", "--model", "echo:"),
                env=settings,
                stderr=subprocess.DEVNULL,
            )
            for _ in range(num_workers)
        ]
        peak, stop = [before], threading.Event()
        watcher = threading.Thread(target=_watch, args=(connection, peak, stop))
        watcher.start()
        started_at = time.perf_counter()
        try:
            summary = asyncio.run(_run(server.url, source, output))
        finally:
            stop.set()
            watcher.join()
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait(30)
        elapsed_s = time.perf_counter() - started_at
        with output.open(encoding="utf-8") as lines:
            rows = sorted(json.loads(line)["row"] for line in lines)
        after = connection.info("memory")["used_memory"]
        connection.close()
        return {
            "requests": count,
            "complete": rows == list(range(count)) and not summary.errors,
            "elapsed_s": elapsed_s,
            "rows_per_s": count / elapsed_s,
            "redis_bytes_before": before,
            "redis_bytes_peak": max(peak),
            "redis_bytes_after": after,
        }


def _write_rows(path: Path, count: int) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for index in range(count):
            row = {"id": index, "prompt": " ".join(draw.choices(_WORDS, k=16)), "max_tokens": 1}
            out.write(json.dumps(row) + "\n")


async def _run(url: str, source: Path, output: Path) -> Any:
    async with Client(settings=QueueSettings(redis_url=url)) as client:
        return await run_dataset(client, source, output)


def _watch(connection: redis.Redis, peak: list[int], stop: threading.Event) -> None:
    while not stop.wait(LOOK_EVERY_S):
        peak.append(max(peak.pop(), connection.info("memory")["used_memory"]))
