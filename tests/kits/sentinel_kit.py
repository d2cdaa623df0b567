"""A primary, a replica and a Sentinel of our own, for tests of failover."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from pathlib import Path

import redis
from kits.worker_kit import until

from queue_api.connection.embedded import find_server

SERVICE = "mymaster"
SILENT_MS = 1000
"""So long without an answer, and a server is taken for dead."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class SentinelGroup:
    """Two servers and one Sentinel on ports of localhost, as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.servers = (free_port(), free_port())
        self.sentinel = free_port()

    def __enter__(self) -> SentinelGroup:
        first, second = self.servers
        try:
            self.start(first)
            self.start(second, "--replicaof", "127.0.0.1", str(first))
            until(lambda: self.info(second).get("master_link_status") == "up")
            self._start_sentinel(first)
            # it can't fail over to a replica that it hasn't heard of
            until(lambda: self._watched().get("num-slaves") == 1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    @property
    def url(self) -> str:
        """With a Sentinel in front that doesn't answer."""
        return f"redis+sentinel://127.0.0.1:1,127.0.0.1:{self.sentinel}/{SERVICE}/0"

    @property
    def primary(self) -> int:
        """The port of the server that Sentinel calls primary."""
        return int(self._watched()["port"])

    def start(self, port: int, *options: str) -> None:
        folder = self._folder / str(port)
        folder.mkdir(exist_ok=True)
        settings = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
        settings += ["--appendonly", "yes", "--save", "", "--repl-diskless-sync-delay", "0"]
        self._run(port, *settings, *options)

    def kill(self, port: int) -> None:
        self.processes[port].kill()
        self.processes[port].wait()

    def switch(self) -> None:
        """Have the replica take over from a primary that lives."""
        first = self.primary
        until(self._ask_to_switch)
        until(lambda: self.primary != first)
        until(lambda: self.info(first).get("role") == "slave")

    def _ask_to_switch(self) -> bool:
        """False while Sentinel doesn't know yet that the replica is fit."""
        with redis.Redis(port=self.sentinel) as client:
            try:
                client.execute_command("SENTINEL", "FAILOVER", SERVICE)
            except redis.ResponseError as error:
                if "NOGOODSLAVE" in str(error):
                    return False
                raise
        return True

    def info(self, port: int) -> dict[str, object]:
        with contextlib.suppress(redis.RedisError), redis.Redis(port=port) as client:
            return dict(client.info("replication"))
        return {}

    def _watched(self) -> dict[str, object]:
        with contextlib.suppress(redis.RedisError), redis.Redis(port=self.sentinel) as client:
            return dict(client.sentinel_master(SERVICE))
        return {}

    def _start_sentinel(self, primary: int) -> None:
        # it writes what it learns into its configuration
        file = self._folder / "sentinel.conf"
        lines = [
            f"port {self.sentinel}",
            "bind 127.0.0.1",
            f"dir {self._folder}",
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary} 1",
            f"sentinel down-after-milliseconds {SERVICE} {SILENT_MS}",
            f"sentinel failover-timeout {SERVICE} 5000",
        ]
        file.write_text("\n".join(lines) + "\n")
        self._run(self.sentinel, str(file), "--sentinel")

    def _run(self, port: int, *arguments: str) -> None:
        self.processes[port] = subprocess.Popen(
            [str(find_server()), *arguments], stdout=subprocess.DEVNULL
        )
        until(lambda: _answers(port))


def _answers(port: int) -> bool:
    with contextlib.suppress(redis.RedisError), redis.Redis(port=port) as client:
        return bool(client.ping())
    return False
