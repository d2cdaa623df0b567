"""Real worker processes and runs on a real Redis, for the tests of the worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import redis
from rq.job import Job
from rq.worker import BaseWorker

from queue_api.connection.settings import QueueSettings
from queue_api.store.enqueue import JobTemplate
from queue_api.store.jobs import chunk_job_id, request_json
from queue_api.store.keys import RunKeys
from queue_api.store.run_store import read_entries
from queue_api.store.scripts import load_script
from queue_api.wire.schemas import GenerationRequest, GenerationResult

QUEUE = "batchmill"
PATIENCE_S = 60.0
SERVE = """
import logging, sys
logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s %(message)s")
from workers.settings import WorkerSettings
from workers.worker import run_worker
sys.exit(run_worker(WorkerSettings()))
"""


def until(condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Poll until the condition is true and return what it gave."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


def written(connection: redis.Redis) -> None:
    """Wait until the kernel has all that the server acknowledged.

    While the disk is busy the server answers before it writes: see docs/reliability.md.
    """
    until(lambda: connection.info("persistence")["aof_buffer_length"] == 0)


class WorkerProcess:
    """`run_worker` in a process of its own; settings as keyword arguments."""

    def __init__(
        self,
        redis_url: str,
        log: Path,
        model: str = "echo:tokens=2",
        script: str = SERVE,
        **settings: Any,
    ):
        environment = {f"BATCHMILL_{name.upper()}": str(value) for name, value in settings.items()}
        environment |= {"BATCHMILL_REDIS_URL": redis_url, "BATCHMILL_MODEL": model}
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **environment},
            stderr=log.open("ab"),
            cwd=Path(__file__).parent.parent.parent,
        )

    def send(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def said(self) -> str:
        return self.log.read_text()


def workers(connection: redis.Redis) -> list[BaseWorker]:
    """The live workers as RQ's tools see them."""
    return BaseWorker.all(connection=connection)


def submit(
    connection: redis.Redis,
    run: str,
    prompts: Sequence[str],
    *,
    chunk_size: int = 8,
    retries: int = 3,
    max_tokens: int = 1000,
    queue: str = QUEUE,
) -> list[str]:
    """Put a run on the queue as the client does; returns the job ids."""
    settings = QueueSettings(chunk_size=chunk_size, retries=retries)
    template = JobTemplate(connection, queue, settings)
    enqueue = connection.register_script(load_script("enqueue"))
    fields = {"queue": queue, "total": len(prompts), "chunk_size": chunk_size}
    connection.hset(RunKeys.of(run).hash, mapping={**fields, "submitted": len(prompts)})
    requests = [
        GenerationRequest(id=f"id-{i}", prompt=text, sampling={"max_tokens": max_tokens})
        for i, text in enumerate(prompts)
    ]
    job_ids = []
    items = [(i, request_json(request)) for i, request in enumerate(requests)]
    for start in range(0, len(requests), chunk_size):
        job_id = chunk_job_id(run, start // chunk_size)
        call = template.call(job_id, run, items[start : start + chunk_size])
        assert enqueue(keys=call.keys, args=call.args) == 1
        job_ids.append(job_id)
    return job_ids


def num_done(connection: redis.Redis, run: str) -> int:
    return len(read_entries(connection.xrange(RunKeys.of(run).results)))


def results(connection: redis.Redis, run: str) -> list[GenerationResult]:
    """All results in the run's stream, in their order."""
    entries = read_entries(connection.xrange(RunKeys.of(run).results))
    return [GenerationResult.model_validate_json(raw) for _, _, raw in entries]


def completed(connection: redis.Redis, run: str, total: int) -> list[GenerationResult]:
    """Wait for the run; check that each request has exactly one result; return by index."""
    until(lambda: num_done(connection, run) >= total)
    found = results(connection, run)
    assert sorted(result.index for result in found) == list(range(total))
    return sorted(found, key=lambda result: result.index)


def status(connection: redis.Redis, job_id: str) -> str:
    return Job.fetch(job_id, connection=connection, serializer="json").get_status().value
