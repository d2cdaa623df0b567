"""The ACL line of the docs is enough for a worker and its producers, and for nothing else."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import redis
from kits.worker_kit import QUEUE, WorkerProcess, completed, submit, until, workers
from rq import Queue
from rq.command import send_stop_job_command

from queue_api.client.sync_client import SyncClient
from queue_api.connection.connect import connect
from queue_api.store.jobs import GENERATE

pytestmark = pytest.mark.servers

PAGE = Path(__file__).parent.parent / "docs" / "redis.md"


@pytest.fixture
def url(server, connection):
    line = re.search(r"^ACL SETUSER batchmill .*$", PAGE.read_text(), re.MULTILINE)
    connection.execute_command(*shlex.split(line[0].replace("PASSWORD", "se:cr@et/")))
    yield server.url.replace("unix://", "unix://batchmill:se%3Acr%40et%2F@")
    connection.execute_command("ACL", "DELUSER", "batchmill")


@pytest.fixture
def worker(connection, url, tmp_path):
    process = WorkerProcess(
        url, tmp_path / "worker.log", "echo:tokens=100,step_s=0.01", checkpoint_tokens=4
    )
    until(lambda: workers(connection) or process.process.poll() is not None)
    yield process
    process.kill()


def test_worker_and_producer_live_with_the_line(url, worker):
    restricted = connect(url)
    submit(restricted, "run", ["a b", "c d"])
    assert {result.ok for result in completed(restricted, "run", 2)} == {True}
    with SyncClient(url) as client:
        assert client.generate("a b", max_tokens=2).text == "a b"
        assert {result.ok for result in client.submit(["a b"] * 40).results()} == {True}
        # a queue that nobody serves
        assert client.submit(["a b"] * 40, queue="idle").cancel() == 40
    assert Queue("idle", connection=restricted, serializer="json").canceled_job_registry.count == 2
    queue = Queue(QUEUE, connection=restricted, serializer="json")
    first = queue.enqueue(GENERATE, "a b")
    second = queue.enqueue(GENERATE, "a b", depends_on=first)
    until(lambda: second.get_status() == "finished")
    stopped = queue.enqueue(GENERATE, "a b", max_tokens=100)
    until(lambda: stopped.get_status() == "started")
    send_stop_job_command(restricted, stopped.id, serializer="json")
    until(lambda: stopped.get_status() == "stopped")
    worker.process.terminate()
    assert worker.wait() == 0
    assert "NOPERM" not in worker.said() and "no permission" not in worker.said().lower()


@pytest.mark.parametrize(
    "command", ["FLUSHALL", "CONFIG GET dir", "KEYS *", "GET other", "SHUTDOWN NOSAVE"]
)
def test_the_line_permits_nothing_else(url, command):
    with pytest.raises(redis.exceptions.NoPermissionError):
        connect(url).execute_command(*command.split())


def test_a_wrong_password_is_told_in_clear_words_and_kept_secret(server, url, tmp_path):
    wrong = url.replace("se%3Acr%40et%2F", "guess%40")
    process = WorkerProcess(wrong, tmp_path / "worker.log")
    assert process.wait() != 0
    assert "refused the user or password" in process.said()
    assert "guess" not in process.said()
