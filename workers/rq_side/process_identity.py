"""Tells whether the process that a worker's entry in Redis names is certainly gone.

Host names and pids don't tell: containers share host names, pids are used again, and each pid
namespace counts its own. What tells is all of host name, boot id, the namespaces of pids and of
time, the pid, and when the process started. Only who sees the same pids can say that one is gone;
anyone else doesn't know.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

__all__ = ["is_certainly_gone", "own_identity"]

PROC = Path("/proc")


def own_identity() -> str | None:
    """What `is_certainly_gone` asks for, of this process; None where there is no /proc."""
    try:
        return f"{_place()} {os.getpid()} {_state_and_start(os.getpid())[1]}"
    except (OSError, ValueError, IndexError):
        return None


def is_certainly_gone(identity: str) -> bool:
    """False if the process lives, is stopped, or can't be seen from here."""
    try:
        kernel, pid, start = identity.rsplit(" ", 2)
        if kernel != _place() or int(pid) <= 0:
            return False
        os.kill(int(pid), 0)
        state, started = _state_and_start(int(pid))
    except ProcessLookupError:
        return True  # of kill alone: a hidden /proc entry is a FileNotFoundError
    except (OSError, ValueError, IndexError, OverflowError):
        return False
    return state == "Z" or started != start


def _place() -> str:
    """Host, boot, and the namespaces in which pid and start time mean something.

    The number of a namespace is used again only when all its processes are gone.
    """
    boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    spaces = [str((PROC / "self/ns" / name).readlink()) for name in ("pid", "time")]
    return " ".join([socket.gethostname(), boot, *spaces])


def _state_and_start(pid: int) -> tuple[str, str]:
    """State letter and start in clock ticks since boot; fields 3 and 22 of proc(5)'s stat."""
    # the name, field 2, is in parentheses and may hold spaces and parentheses
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
