"""Worker processes on this machine: started, watched, restarted within bounds, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from queue_api.connection.child_process import (
    child_environment,
    die_with_parent,
    python_module,
)
from queue_api.wire.errors import ConfigurationError, RunIncompleteError

__all__ = ["ClusterError", "LocalCluster"]

logger = logging.getLogger(__name__)

EXIT_USAGE = 2
"""Exit code of a worker that was set up wrongly: starting it again would change nothing."""
RESTART_PAUSE_S = 2.0
"""Before another try of a worker that couldn't be set up."""
_KEPT_LINES = 20
RESTARTS_TO_BEGIN = 3
"""Of each place, until a worker serves: what fails so early fails on this machine."""
RESTARTS_WITHOUT_TEXT = 10
"""Of each place once workers serve, from one text to the next: a few rows that make workers crash
are found out by them (BATCHMILL_MAX_DEATHS); a machine on which all crash is to be told of."""


class ClusterError(RunIncompleteError):
    """No worker is left, and none that is started again stays up."""


class LocalCluster:
    """`num_workers` processes of `batchmill worker`; use as an async context manager.

    A worker that dies is started again, within a budget of restarts per place that `refill` fills
    up. What it had claimed is taken over by others when its leases run out, and a request that
    makes workers crash is quarantined.
    """

    def __init__(
        self,
        num_workers: int,
        environment: Mapping[str, str],
        *,
        arguments: Sequence[str] = (),
        stop_timeout_s: float = 30.0,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self.num_workers = num_workers
        self._environment = child_environment(environment)
        self._command = python_module("batchmill", "worker", *arguments)
        self._restarts_left = [RESTARTS_TO_BEGIN] * num_workers
        self._stop_timeout_s = stop_timeout_s
        self._on_line = on_line
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._stopping = asyncio.Event()
        self._have_served = False
        self._watchers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._watchers = [
            asyncio.create_task(self._keep_alive(place)) for place in range(self.num_workers)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [process.pid for process in self._processes.values() if process.returncode is None]

    def refill(self) -> None:
        """Workers serve, or a text has come out of one: give every place its restarts anew."""
        self._restarts_left = [RESTARTS_WITHOUT_TEXT] * self.num_workers
        self._have_served = True

    async def watch(self) -> None:
        """Return when stopped.

        :raises ClusterError: when no worker is left that could be started again
        :raises ConfigurationError: when a worker refuses its settings, in its words
        """
        if self._watchers:
            # not gather: who gives up this wait mustn't cancel the watchers
            ended, _ = await asyncio.wait(self._watchers, return_when=asyncio.FIRST_EXCEPTION)
            for watcher in ended:
                watcher.result()
        if not self._stopping.is_set():
            raise ClusterError(
                f"all {self.num_workers} workers ended, and starting them again brought no "
                f"text; the last one said: {self._last_words('nothing')}"
            )

    def kill(self) -> None:
        """End the workers at once: there is nothing that they could give their work back to."""
        self._stopping.set()
        self._signal_all(signal.SIGKILL)

    async def stop(self) -> None:
        """Drain the workers (SIGTERM); kill those that take longer than `stop_timeout_s`."""
        self._stopping.set()
        self._signal_all(signal.SIGTERM)
        if not self._watchers:
            return
        _, late = await asyncio.wait(self._watchers, timeout=self._stop_timeout_s)
        if late:
            logger.warning("%d workers didn't end in %.0f s", len(late), self._stop_timeout_s)
            self._signal_all(signal.SIGKILL)
        # looked at here, for `watch` raises the first of their errors only
        await asyncio.gather(*self._watchers, return_exceptions=True)

    def _last_words(self, otherwise: str) -> str:
        last = self._last_lines[-1] if self._last_lines else otherwise
        return last.removeprefix("batchmill: ")

    def _signal_all(self, signum: signal.Signals) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                process.send_signal(signum)

    async def _keep_alive(self, place: int) -> None:
        """Run one worker after another in this place until stopped or out of restarts."""
        while not self._stopping.is_set():
            code = await self._run_once(place)
            if self._stopping.is_set():
                return
            # one that could serve before finds Redis away, say, and may do so again
            if code == EXIT_USAGE and not self._have_served:
                raise ConfigurationError(self._last_words("a worker refused its settings"))
            left = self._restarts_left[place]
            logger.warning("worker %d ended with code %s; %d restarts left", place, code, left)
            if not left:
                return
            self._restarts_left[place] -= 1
            if code == EXIT_USAGE:
                await self._pause()

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESTART_PAUSE_S):
                await self._stopping.wait()

    async def _run_once(self, place: int) -> int:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            # A terminal's Ctrl-C goes to the whole group; workers are to be told by us alone.
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
        self._processes[place] = process
        if self._stopping.is_set():
            process.terminate()
        assert process.stderr is not None
        async for raw in process.stderr:
            line = raw.decode(errors="replace").rstrip()
            self._last_lines.append(line)
            if self._on_line is not None:
                self._on_line(line)
        return await process.wait()
