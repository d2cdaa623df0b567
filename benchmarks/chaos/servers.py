"""Two servers behind one address, and what goes wrong with the one that is primary."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import redis

from queue_api.connection.connect import connect
from queue_api.connection.embedded import EmbeddedRedis

__all__ = ["ServerPair"]

PATIENCE_S = 60.0
POLL_S = 0.02


class ServerPair:
    """A primary and a spare that can take over; use as a context manager.

    The address is a link to the primary's socket. Each fault has a method that begins it and one
    that ends it.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> ServerPair:
        self._ports: dict[EmbeddedRedis, int] = {}
        self.primary, self._spare = self._started(), self._started()
        self._link = _socket_of(self.primary).with_name("primary.sock")
        self._link.symlink_to(_socket_of(self.primary))
        return self

    def __exit__(self, *_: object) -> None:
        self.make_whole()
        self._stack.close()

    def _started(self) -> EmbeddedRedis:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = int(probe.getsockname()[1])
        # replicas can't reach a socket
        options = {"port": str(port), "bind": "127.0.0.1", "repl-diskless-sync-delay": "0"}
        server = self._stack.enter_context(EmbeddedRedis(options=options))
        self._ports[server] = port
        return server

    @property
    def url(self) -> str:
        """The address that leads to the primary."""
        return f"unix://{self._link}"

    def _tell(self, server: EmbeddedRedis, *command: str | int) -> object:
        with connect(server.url, max_connections=1) as client:
            return client.execute_command(*command)

    def _replication(self, server: EmbeddedRedis) -> dict[str, object]:
        with connect(server.url, max_connections=1) as client:
            return dict(client.info("replication"))

    # --- a crash, a pause ---------------------------------------------------------------------

    def kill(self) -> None:
        os.kill(self.primary.pid, signal.SIGKILL)

    def restart(self) -> None:
        self.primary.restart(kill=True)

    def stop(self) -> None:
        os.kill(self.primary.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.primary.pid, signal.SIGCONT)

    # --- no room ------------------------------------------------------------------------------

    def fill_memory(self) -> None:
        """Less memory than its data take."""
        self._tell(self.primary, "CONFIG", "SET", "maxmemory", 1)

    def add_memory(self) -> None:
        self._tell(self.primary, "CONFIG", "SET", "maxmemory", 0)

    def fill_disk(self) -> None:
        """No file of the server's may grow, as if its disk were full."""
        _, hard = resource.prlimit(self.primary.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.primary.pid, resource.RLIMIT_FSIZE, (1, hard))

    def add_disk(self) -> None:
        """Until what couldn't be written is."""
        _, hard = resource.prlimit(self.primary.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.primary.pid, resource.RLIMIT_FSIZE, (hard, hard))
        _until(lambda: self._aof_status() == "ok")

    def _aof_status(self) -> object:
        with connect(self.primary.url, max_connections=1) as client:
            return client.info("persistence")["aof_last_write_status"]

    # --- another primary ----------------------------------------------------------------------

    def refuse_writes(self) -> None:
        """The spare follows; the primary wants one replica more than it has."""
        self._tell(self._spare, "REPLICAOF", "127.0.0.1", self._ports[self.primary])
        _until(lambda: self._replication(self._spare).get("master_link_status") == "up")
        self._tell(self.primary, "CONFIG", "SET", "min-replicas-to-write", 2)

    def take_over(self) -> None:
        """Make the spare the primary once it has all, and the old primary its replica."""
        _until(self._is_even)
        self._tell(self._spare, "REPLICAOF", "NO", "ONE")
        fresh = self._link.with_suffix(".new")
        fresh.symlink_to(_socket_of(self._spare))
        fresh.replace(self._link)
        old, self.primary, self._spare = self.primary, self._spare, self.primary
        self._tell(old, "CONFIG", "SET", "min-replicas-to-write", 0)
        self._tell(old, "REPLICAOF", "127.0.0.1", self._ports[self.primary])

    def _is_even(self) -> bool:
        replica = self._replication(self.primary).get("slave0")
        behind = self._replication(self.primary)["master_repl_offset"]
        return isinstance(replica, dict) and int(replica["offset"]) >= int(str(behind))

    # ------------------------------------------------------------------------------------------

    def make_whole(self) -> None:
        """End whatever goes wrong."""
        self.go_on()
        if self.primary.last_words is not None:
            self.restart()
        self.add_memory()
        self.add_disk()
        self._tell(self.primary, "CONFIG", "SET", "min-replicas-to-write", 0)


def _socket_of(server: EmbeddedRedis) -> Path:
    return Path(server.url.removeprefix("unix://"))


def _until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > give_up_at:
            raise redis.TimeoutError(f"{condition} isn't so after {PATIENCE_S} s")
        time.sleep(POLL_S)
