"""Workers with a fixed name: taken over from the dead at once, waited for while one may live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kits.worker_kit import WorkerProcess, completed, submit, until, workers

from workers.rq_side.process_identity import is_certainly_gone, own_identity

pytestmark = pytest.mark.servers

NAME = "mill"
KEY = f"rq:worker:{NAME}"
needs_proc = pytest.mark.skipif(own_identity() is None, reason="needs Linux's /proc")


@pytest.fixture
def start_named(server, connection, tmp_path: Path):
    started: list[WorkerProcess] = []

    def start() -> WorkerProcess:
        log = tmp_path / f"{len(started)}.log"
        started.append(WorkerProcess(server.url, log, name=NAME, lease_s=1))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()


def has(connection, pid: int) -> bool:
    """Whether that process has the name."""
    return connection.hget(KEY, "pid") == str(pid).encode()


@needs_proc
def test_the_name_of_a_killed_worker_is_taken_over_at_once(connection, start_named):
    first = start_named()
    until(lambda: has(connection, first.process.pid))
    first.kill()
    second = start_named()
    until(lambda: has(connection, second.process.pid))
    assert [worker.pid for worker in workers(connection)] == [second.process.pid]
    submit(connection, "run", ["a b"] * 4)
    assert {result.worker for result in completed(connection, "run", 4)} == {NAME}
    assert "is gone" in second.said() and "may be alive" not in second.said()


def test_the_name_of_a_worker_that_stands_still_is_waited_for(connection, start_named):
    first = start_named()
    until(lambda: connection.hget(KEY, "state") == b"idle")  # it beats, so it obeys signals
    first.send(signal.SIGSTOP)
    second = start_named()
    until(lambda: "may be alive" in second.said())
    assert has(connection, first.process.pid)
    assert f"pid {first.process.pid}" in second.said()
    first.send(signal.SIGCONT)
    first.send(signal.SIGTERM)
    assert first.wait() == 0
    until(lambda: has(connection, second.process.pid))


def test_a_name_from_elsewhere_is_waited_for_until_it_lapses(connection, start_named):
    elsewhere = f"host boot pid:[1] time:[1] {2**22} 1"
    fields = {"pid": 7, "hostname": "host", "process": elsewhere}
    connection.hset(KEY, mapping=fields)
    second = start_named()
    until(lambda: "pid 7 on host" in second.said())
    assert has(connection, 7)
    connection.pexpire(KEY, 1)
    until(lambda: has(connection, second.process.pid))


def test_of_two_successors_one_gets_the_name(connection, start_named):
    connection.hset(KEY, "pid", 7)
    rivals = [start_named(), start_named()]
    for rival in rivals:
        until(lambda rival=rival: "pid 7" in rival.said())
    connection.delete(KEY)
    winner = until(lambda: [r for r in rivals if has(connection, r.process.pid)])[0]
    (loser,) = [rival for rival in rivals if rival is not winner]
    submit(connection, "run", ["a b"] * 4)
    completed(connection, "run", 4)
    assert has(connection, winner.process.pid)
    assert "serves" not in loser.said()


@needs_proc
def test_only_a_process_that_was_seen_here_is_certainly_gone():
    own = own_identity()
    assert own is not None and not is_certainly_gone(own)
    place, pid, start = own.rsplit(" ", 2)
    assert is_certainly_gone(f"{place} {pid} {int(start) - 1}"), "the pid was used again"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_certainly_gone(f"{place} {child.pid} {start}"), "dead, if not yet buried"
    child.communicate()
    assert is_certainly_gone(f"{place} {child.pid} {start}")
    assert not is_certainly_gone(f"other{place} {child.pid} {start}")


@needs_proc
@pytest.mark.parametrize("end", ["", "x y", "0 1", "-1 1", f"{2**70} 1"])
def test_an_identity_that_cant_be_read_proves_nothing(end):
    own = own_identity()
    assert own is not None
    assert not is_certainly_gone(f"{own.rsplit(' ', 2)[0]} {end}")
