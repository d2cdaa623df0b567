"""The ACL lines of the docs are enough for a worker and for a client, and for nothing else."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from kits.worker_kit import QUEUE, WorkerProcess, completed, submit, until, workers
from rq import Queue
from rq.command import send_stop_job_command

from queue_api.client.client import Client
from queue_api.client.sync_client import SyncClient
from queue_api.connection.connect import connect
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.run import run_dataset
from queue_api.datasets.summary import RunSummary
from queue_api.store.jobs import GENERATE
from queue_api.wire.errors import DatasetError

pytestmark = pytest.mark.servers

PAGE = Path(__file__).parent.parent / "docs" / "redis.md"


def user(server, connection, name: str) -> Iterator[str]:
    """An address with the user whose line the page has."""
    line = re.search(rf"^ACL SETUSER {name} .*$", PAGE.read_text(), re.MULTILINE)
    connection.execute_command(*shlex.split(line[0].replace("PASSWORD", "se:cr@et/")))
    yield server.url.replace("unix://", f"unix://{name}:se%3Acr%40et%2F@")
    connection.execute_command("ACL", "DELUSER", name)


@pytest.fixture
def url(server, connection):
    yield from user(server, connection, "batchmill-worker")


@pytest.fixture
def client_url(server, connection):
    yield from user(server, connection, "batchmill-client")


@pytest.fixture
def worker(connection, url, tmp_path):
    process = WorkerProcess(
        url, tmp_path / "worker.log", "echo:tokens=100,step_s=0.01", checkpoint_tokens=4
    )
    until(lambda: workers(connection) or process.process.poll() is not None)
    yield process
    process.kill()


def test_worker_and_client_live_with_their_lines(url, client_url, worker):
    restricted = connect(client_url)
    submit(restricted, "run", ["a b", "c d"])
    assert {result.ok for result in completed(restricted, "run", 2)} == {True}
    with SyncClient(client_url) as client:
        assert client.generate("a b", max_tokens=2).text == "a b"
        assert client.generate("a b", id="mine", max_tokens=2).text == "a b"
        assert {result.ok for result in client.submit(["a b"] * 40).results()} == {True}
        # a queue that nobody serves
        assert client.submit(["a b"] * 40, queue="idle").cancel() == 40
        # one that runs, whose job ends in RQ's own handlers
        run = client.submit(["a b"] * 4)
        until(lambda: restricted.zcard(f"rq:wip:{QUEUE}"))
        assert run.cancel() == 4
        until(lambda: not restricted.zcard(f"rq:wip:{QUEUE}"))
        assert run.wait().complete
    assert Queue("idle", connection=restricted, serializer="json").canceled_job_registry.count == 2
    worker.process.terminate()
    assert worker.wait() == 0
    assert "NOPERM" not in worker.said() and "no permission" not in worker.said().lower()


def test_a_dataset_run_lives_with_the_client_s_line(client_url, worker, tmp_path):
    """It may not read which model the workers have, and looks at the first result in its place."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [json.dumps({"prompt": f"p{i}", "max_tokens": 1}) + "\n" for i in range(3)]
    source.write_text("".join(rows[:2]))

    async def answer(**options: bool) -> RunSummary:
        async with Client(client_url) as client:
            return await run_dataset(client, source, output, **options)

    assert asyncio.run(answer()).rows == 2
    output.write_text(output.read_text().replace('"model":"echo:tokens=100"', '"model":"another"'))
    source.write_text("".join(rows))
    before = output.read_bytes()
    with pytest.raises(DatasetError, match="made by another, the workers have echo"):
        asyncio.run(answer())
    assert output.read_bytes() == before


def test_rq_s_own_tools_live_with_the_worker_s_line(url, worker):
    restricted = connect(url)
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


def test_a_client_sweeps_and_sends_again_with_its_line(client_url, connection):
    settings = QueueSettings.load(redis_url=client_url, reconcile_s=0.05, chunk_size=2)
    queue, strays = f"rq:queue:{QUEUE}", f"batchmill:strays:{QUEUE}"

    async def main() -> None:
        async with Client(settings=settings) as client:
            run = await client.submit([f"w{i}" for i in range(4)], "run")
            reading = asyncio.create_task(anext(run.results()))
            connection.delete(queue, "rq:job:run-0")
            await asyncio.to_thread(until, lambda: connection.llen(queue) == 2)
            # as a worker of stock RQ leaves them
            connection.delete(queue)
            for job in ("rq:job:run-0", "rq:job:run-1"):
                connection.hset(job, mapping={"status": "failed", "worker_name": "other"})
            await asyncio.to_thread(until, lambda: connection.llen(strays) == 2)
            assert not reading.done()
            reading.cancel()

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize(
    "command", ["FLUSHALL", "CONFIG GET dir", "KEYS *", "GET other", "SHUTDOWN NOSAVE"]
)
def test_the_lines_permit_nothing_else(url, client_url, command):
    for restricted in (url, client_url):
        with pytest.raises(redis.exceptions.NoPermissionError):
            connect(restricted).execute_command(*command.split())


@pytest.mark.parametrize(
    "command",
    [
        'PUBLISH rq:pubsub:worker {"command":"shutdown"}',
        "SUBSCRIBE rq:pubsub:worker",
        "SET rq:suspended 1",
        "DEL rq:worker:some",
        "SADD rq:workers some",
    ],
)
def test_a_client_can_t_command_workers(client_url, command):
    with pytest.raises(redis.exceptions.NoPermissionError):
        connect(client_url).execute_command(*command.split())


def test_a_wrong_password_is_told_in_clear_words_and_kept_secret(server, url, tmp_path):
    wrong = url.replace("se%3Acr%40et%2F", "guess%40")
    process = WorkerProcess(wrong, tmp_path / "worker.log")
    assert process.wait() != 0
    assert "refused the user or password" in process.said()
    assert "guess" not in process.said()
