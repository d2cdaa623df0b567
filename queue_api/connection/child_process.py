"""Child processes: Python ones run our code and no stranger's, and none outlives its parent."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["child_environment", "die_with_parent", "python_module"]

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn` that asks Linux to send SIGTERM if the parent dies without a chance to.

    It is the death of the thread that started the child which counts, so start it from one that
    lives as long as you need it. None where there is no such service.
    """
    if not sys.platform.startswith("linux"):
        return None
    # looked up here: between fork and exec as little as possible may run
    prctl = ctypes.CDLL(None).prctl
    return functools.partial(_call, prctl, _PR_SET_PDEATHSIG, signal.SIGTERM.value)


def _call(function: Callable[..., int], *args: int) -> None:
    function(*args)


def python_module(module: str, *arguments: str) -> list[str]:
    """A command that runs an installed module in this Python; the current directory is only data.

    Give it `child_environment`, too.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment and `more`, without the current directory on PYTHONPATH.

    An empty entry there, as `PYTHONPATH=$PYTHONPATH:…` leaves where it was unset, means just that.
    """
    environment = {**os.environ, **(more or {})}
    given = environment.pop("PYTHONPATH", "")
    here = Path.cwd()
    kept = [entry for entry in given.split(os.pathsep) if entry and Path(entry).resolve() != here]
    if kept:
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    return environment
