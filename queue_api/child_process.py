"""Child processes that don't outlive their parent."""

from __future__ import annotations

import ctypes
import functools
import signal
import sys
from collections.abc import Callable

__all__ = ["die_with_parent"]

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
