"""`batchmill` and `python -m batchmill`."""

from __future__ import annotations

import os
import sys

from batchmill.hidden_password import hide_password
from batchmill.own_packages import strangers

__all__ = ["main"]


def _hold_standard_streams() -> None:
    """Open what of stdin, stdout and stderr is closed, so that no file of ours takes its number.

    A child would have that file for its stdout. Python has noted that they are closed: sys.stdin
    and the like stay None.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def main() -> None:
    """Run the command that the arguments name; ends the process with its exit code."""
    _hold_standard_streams()
    if found := strangers():
        sys.stderr.write(f"batchmill: {found}\n")
        sys.exit(2)
    hide_password()
    from batchmill.commands.app import main as run_command

    run_command()


if __name__ == "__main__":
    main()
