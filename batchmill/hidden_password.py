"""Takes a password off the command line, which everybody on the machine may read (`ps`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from queue_api.connection.address import safe_url

__all__ = ["hide_password"]

OPTION, VARIABLE = "--redis-url", "BATCHMILL_REDIS_URL"


def hide_password() -> None:
    """Start this command anew if an address with a password is among its arguments.

    The same process goes on, with the address in its environment, which its user alone may read.
    """
    url, others = _taken_out(sys.argv[1:])
    if url is None or safe_url(url) == url:
        return
    ours = len(sys.orig_argv) - len(sys.argv) + 1
    command = [*sys.orig_argv[:ours], *others]
    os.execve(sys.executable, command, {**os.environ, VARIABLE: url})


def _taken_out(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of the option, None if it isn't there, and the other arguments."""
    url, others, left = None, list[str](), iter(arguments)
    for argument in left:
        if argument == OPTION:
            url = next(left, None)
        elif argument.startswith(f"{OPTION}="):
            url = argument.partition("=")[2]
        else:
            others.append(argument)
    return url, others
