"""A process beside the engine for what may take for ever: it is given a time, then killed."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

__all__ = ["GrammarProcess", "GrammarProcessError"]

START_LIMIT_S = 120.0
"""It imports xgrammar, which imports torch."""
_ROOT = str(Path(__file__).parents[2])
# our own package first, the current directory nowhere
_COMMAND = (
    f"import sys; sys.path.insert(0, {_ROOT!r}); "
    "from engine.sampling.grammar_child import main; main()"
)


class GrammarProcessError(Exception):
    """No answer: it took too long, or the process ended."""


class GrammarProcess:
    """Answers one request at a time. Started when it is needed, and anew if it was killed.

    :param vocabulary: `xgrammar.TokenizerInfo` as JSON, for grammars; None for checks alone
    """

    def __init__(self, vocabulary: str | None = None) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()

    def start(self) -> None:
        """See that it runs and has read what it needs.

        :raises GrammarProcessError: it can't be started
        """
        with self._lock:
            self._start()

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The answer; see grammar_child.py.

        :param limit_s: from the request on, without the time to start; then the process is killed
        :raises GrammarProcessError: no answer
        """
        with self._lock:
            return self._exchange(self._start(), request, limit_s)

    def kill(self) -> None:
        """End it for good, whatever it does; whoever waits for an answer is told."""
        self._over.set()
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End it and let go of it; waits for an answer that somebody waits for."""
        with self._lock:
            self._drop()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._drop()
        if self._over.is_set():
            raise GrammarProcessError("it was ended")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
        )
        if self._over.is_set():  # meanwhile
            self._process.kill()
        first = {} if self._vocabulary is None else {"vocabulary": self._vocabulary}
        self._exchange(self._process, first, START_LIMIT_S)
        return self._process

    def _exchange(
        self, process: subprocess.Popen[bytes], request: dict[str, Any], limit_s: float
    ) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(_read_line(process.stdout, limit_s))
        except TimeoutError:
            self._drop()
            raise GrammarProcessError("it took too long") from None
        except (OSError, ValueError):
            self._drop()
            raise GrammarProcessError("it ended without an answer") from None
        return answer

    def _drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):  # what is left in its buffer goes nowhere
                    pipe.close()


def _read_line(stream: IO[bytes], limit_s: float) -> bytes:
    """:raises TimeoutError: not within the limit
    :raises OSError: the other end is closed
    """
    end_at = time.monotonic() + limit_s
    line = b""
    with selectors.DefaultSelector() as ready:
        ready.register(stream, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not ready.select(max(0.0, end_at - time.monotonic())):
                raise TimeoutError
            part = os.read(stream.fileno(), 1 << 16)
            if not part:
                raise OSError("closed")
            line += part
    return line


def _environment() -> dict[str, str]:
    """Ours, without the current directory on PYTHONPATH."""
    environment = dict(os.environ)
    given = environment.pop("PYTHONPATH", "").split(os.pathsep)
    here = Path.cwd()
    if kept := [entry for entry in given if entry and Path(entry).resolve() != here]:
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    return environment
