"""One request at a time: through client, Redis and worker, and given to the engine directly."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import time
from typing import Any

from batchmill import Client, GenerationRequest, QueueSettings
from benchmarks.children import environment, module
from queue_api.connection.embedded import EmbeddedRedis
from workers.running.echo_engine import EchoEngine

__all__ = ["measure"]

WARM_UP = 20
TOKENS, STEP_S = 8, 0.002
PROMPT = "one two three four five six seven eight"


def measure(count: int) -> dict[str, Any]:
    """Milliseconds; the overhead is the difference of the medians."""
    direct = _directly(count)
    with EmbeddedRedis() as server:
        model = f"echo:tokens={TOKENS},step_s={STEP_S}"
        worker = subprocess.Popen(
            module("batchmill", "worker", "--model", model),
            env=environment(BATCHMILL_REDIS_URL=server.url),
            stderr=subprocess.DEVNULL,
        )
        try:
            through = asyncio.run(_through_redis(server.url, count))
        finally:
            worker.terminate()
            worker.wait(30)
    return {
        "calls": count,
        "direct_ms": statistics.median(direct) * 1e3,
        "through_redis_ms": statistics.median(through) * 1e3,
        "through_redis_p95_ms": statistics.quantiles(through, n=20)[-1] * 1e3,
        "overhead_ms": (statistics.median(through) - statistics.median(direct)) * 1e3,
    }


def _directly(count: int) -> list[float]:
    engine = EchoEngine(tokens=TOKENS, step_s=STEP_S)
    taken = []
    for number in range(WARM_UP + count):
        started_at = time.perf_counter()
        engine.add(str(number), GenerationRequest(id=str(number), prompt=PROMPT))
        while engine.has_unfinished():
            engine.step()
        taken.append(time.perf_counter() - started_at)
    return taken[WARM_UP:]


async def _through_redis(url: str, count: int) -> list[float]:
    taken = []
    async with Client(settings=QueueSettings(redis_url=url)) as client:
        for _ in range(WARM_UP + count):
            started_at = time.perf_counter()
            (await client.generate(PROMPT)).raise_for_error()
            taken.append(time.perf_counter() - started_at)
    return taken[WARM_UP:]
