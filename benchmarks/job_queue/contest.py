"""Who is measured, and with how much: the slow ones with fewer requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["BARE", "CONTESTANTS", "JOB_QUEUES", "Contestant"]


@dataclass(frozen=True)
class Contestant:
    """A queue system."""

    key: str
    title: str
    module: str
    """In benchmarks.job_queue.systems."""
    distribution: str
    num_requests: int
    settings: dict[str, Any] = field(default_factory=dict)


CONTESTANTS = (
    Contestant(
        "batchmill-32", "batchmill, chunk 32", "batchmill", "rq", 40_000, {"chunk_size": 32}
    ),
    Contestant("batchmill-1", "batchmill, chunk 1", "batchmill", "rq", 8_000, {"chunk_size": 1}),
    Contestant("streams", "bare Redis Streams, pipelined", "redis_streams", "redis", 40_000),
    Contestant("rq", "RQ SimpleWorker", "rq_simple_worker", "rq", 1_500),
    Contestant("arq", "arq", "arq_worker", "arq", 4_000),
    Contestant("saq", "saq", "saq_worker", "saq", 4_000),
    Contestant("taskiq", "taskiq-redis", "taskiq_redis_broker", "taskiq-redis", 4_000),
)
BARE = "streams"
JOB_QUEUES = ("rq", "arq", "saq", "taskiq")
