"""Whose a client is: its connections and tasks live in one process, on one event loop."""

from __future__ import annotations

import asyncio
import os

from queue_api.wire.errors import ClientClosedError, WrongOwnerError

__all__ = ["Owner", "check_process"]


class Owner:
    """The process and event loop that use something first; it is theirs until it is closed."""

    def __init__(self) -> None:
        self._pid = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_closed = False

    def check(self) -> None:
        """Come from where the first call came from, and before the end.

        :raises ClientClosedError: closed
        :raises WrongOwnerError: another process or event loop
        """
        if self.is_closed:
            raise ClientClosedError("the client is closed; make another one")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._pid, self._loop = os.getpid(), loop
            return
        check_process(self._pid)
        if loop is not self._loop:
            state = "closed by now" if self._loop.is_closed() else "still open"
            raise WrongOwnerError(
                f"the client belongs to another event loop, {state}: its connections and the task "
                "that reads results live there. Make a client for each loop (each asyncio.run), "
                "or use SyncClient, which has a loop of its own"
            )

    @property
    def is_gone(self) -> bool:
        """The event loop that had it is closed: there is nothing left to be let go of."""
        return self._loop is not None and self._loop.is_closed() and self._pid == os.getpid()


def check_process(pid: int) -> None:
    """:raises WrongOwnerError: this process isn't `pid`"""
    if pid != os.getpid():
        raise WrongOwnerError(
            f"the client was made in process {pid}, and this is process {os.getpid()}: neither its "
            "connections nor its thread came through the fork. Make a client in each process, "
            "after the fork"
        )
