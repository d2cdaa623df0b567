"""A private Redis with its own connection and workers, for tests that share nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from kits.worker_kit import WorkerProcess, until, workers

from queue_api.connection.connect import connect
from queue_api.connection.embedded import EmbeddedRedis


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as running:
        yield running


@pytest.fixture
def connection(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    client = connect(server.url)
    client.config_set("maxmemory", 0)  # whatever a test that failed has left
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def start_worker(
    server: EmbeddedRedis, connection: redis.Redis, tmp_path: Path
) -> Iterator[Callable[..., WorkerProcess]]:
    """Start a worker and wait until RQ knows it."""
    started: list[WorkerProcess] = []

    def start(model: str = "echo:tokens=2", **settings: Any) -> WorkerProcess:
        known = len(workers(connection))
        worker = WorkerProcess(server.url, tmp_path / "worker.log", model, **settings)
        started.append(worker)
        until(lambda: len(workers(connection)) > known or worker.process.poll() is not None)
        return worker

    yield start
    for worker in started:
        worker.kill()
