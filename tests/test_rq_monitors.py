"""rq-dashboard and rq-exporter, as their users install them, look at a live batchmill queue.

Each stands in a virtual environment of its own: the exporter wants an older RQ than ours.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kits.worker_kit import QUEUE, completed, submit, until

pytestmark = pytest.mark.slow

NUM_REQUESTS, CHUNK = 200, 8
RUNNING = 32
PORT = object()
"""Stands for the port to listen on in a command."""
SLOW = "echo:tokens=100000,step_s=0.01"


def install(folder: Path, *packages: str) -> Path:
    """The programs of a new virtual environment with these packages."""
    venv.create(folder, with_pip=True)
    command = [folder / "bin/python", "-m", "pip", "install", "--quiet", *packages]
    subprocess.run(command, check=True, timeout=240)
    return folder / "bin"


def read(url: str) -> str | None:
    """What a page says; None as long as nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            return page.read().decode()
    except urllib.error.HTTPError:
        raise
    except OSError:
        return None


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def serve(free_port: int) -> Iterator[Callable[..., str]]:
    """Start a program that serves HTTP, and give its address."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: object) -> str:
        words = [str(free_port) if word is PORT else str(word) for word in command]
        started.append(subprocess.Popen(words, stdout=subprocess.DEVNULL))
        return f"http://127.0.0.1:{free_port}"

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def busy_queue(connection: Any, start_worker: Any) -> None:
    """A run on the queue, a part of it running."""
    submit(connection, "r1", ["a b"] * NUM_REQUESTS, chunk_size=CHUNK, max_tokens=100_000)
    start_worker(SLOW, name="milly", capacity=RUNNING)
    until(lambda: connection.zcard(f"rq:wip:{QUEUE}") == RUNNING // CHUNK)


def test_exporter_counts_workers_and_jobs(server, busy_queue, serve, tmp_path):
    programs = install(tmp_path / "exporter", "rq-exporter==3.1.0")
    address = serve(
        programs / "rq-exporter", "--host", "127.0.0.1", "-p", PORT, "--redis-url", server.url
    )
    metrics = until(lambda: read(f"{address}/metrics"))
    states = dict(re.findall(rf'rq_jobs{{queue="{QUEUE}",status="(\w+)"}} (\S+)', metrics))
    running = RUNNING // CHUNK
    assert float(states["started"]) == running
    assert float(states["queued"]) == NUM_REQUESTS / CHUNK - running
    assert f'rq_workers{{name="milly",queues="{QUEUE}",state="busy"}} 1.0' in metrics


def test_dashboard_shows_queues_and_jobs(server, busy_queue, serve, tmp_path):
    packages = ("rq==3.0.0", "rq-dashboard==0.9.0", "six")
    programs = install(tmp_path / "dashboard", *packages)
    # --json: it reads jobs by pickle otherwise
    address = serve(
        programs / "rq-dashboard", "-b", "127.0.0.1", "-p", PORT, "-u", server.url, "--json"
    )
    (queue,) = json.loads(until(lambda: read(f"{address}/0/data/queues.json")))["queues"]
    assert (queue["name"], queue["started_job_registry_count"]) == (QUEUE, RUNNING // CHUNK)
    page = json.loads(read(f"{address}/0/data/jobs/{QUEUE}/started/8/asc/1.json") or "")
    assert {job["description"].split()[1] for job in page["jobs"]} == {"r1"}
    job = json.loads(read(f"{address}/0/data/job/r1-0.json") or "")
    assert job["status"] == "started"


def test_dashboard_shows_idle_workers(connection, server, start_worker, serve, tmp_path):
    """Its page of workers reads current jobs by pickle, even with --json: only idle ones show."""
    start_worker(name="milly")
    submit(connection, "r1", ["a b"])
    completed(connection, "r1", 1)
    programs = install(tmp_path / "dashboard", "rq==3.0.0", "rq-dashboard==0.9.0", "six")
    address = serve(
        programs / "rq-dashboard", "-b", "127.0.0.1", "-p", PORT, "-u", server.url, "--json"
    )
    (worker,) = json.loads(until(lambda: read(f"{address}/0/data/workers.json")))["workers"]
    assert (worker["name"], worker["queues"]) == ("milly", [QUEUE])
    assert worker["successful_job_count"] == 1
