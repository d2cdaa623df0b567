"""A process that is started again whenever it ends before it should."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks import children
from queue_api.connection.child_process import die_with_parent

__all__ = ["Supervised"]

RESTART_S = 0.1
"""Between two starts, so that what can't start doesn't spin."""


class Supervised:
    """A Python module run as a process; `tend` starts it again.

    :param once: it is through when it ends with code 0, and isn't started again
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        once: bool,
    ) -> None:
        self.name = name
        self.once = once
        self.log = log
        self.num_starts = 0
        self.exit_codes: list[int] = []
        self._command = children.module(*arguments)
        self._environment = children.environment(**environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False
        self._ended_at = 0.0

    @property
    def is_through(self) -> bool:
        return self.once and self.exit_codes[-1:] == [0]

    @property
    def is_running(self) -> bool:
        """Started, not ended, and not standing still."""
        return self._process is not None and not self._is_stopped

    def tend(self) -> None:
        """Note its end; start it again if it has to go on."""
        if self._process is not None and (code := self._process.poll()) is not None:
            self.exit_codes.append(code)
            self._process = None
            self._ended_at = time.monotonic()
        is_due = time.monotonic() - self._ended_at >= RESTART_S
        if self._process is None and not self.is_through and is_due:
            self._start()

    def _start(self) -> None:
        self.num_starts += 1
        self._is_stopped = False
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(),  # noqa: PLW1509 - one libc call that takes no lock
            )

    def send(self, signum: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(signum)
        if signum in (signal.SIGSTOP, signal.SIGCONT):
            self._is_stopped = signum is signal.SIGSTOP

    def end(self, timeout_s: float) -> int | None:
        """Ask it to end; kill it if it doesn't. Returns the code of an orderly end."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None
