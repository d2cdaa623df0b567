"""`batchmill` and `python -m batchmill`."""

from __future__ import annotations

import sys

from batchmill.hidden_password import hide_password
from batchmill.own_packages import strangers

__all__ = ["main"]


def main() -> None:
    """Run the command that the arguments name; ends the process with its exit code."""
    if found := strangers():
        sys.stderr.write(f"batchmill: {found}\n")
        sys.exit(2)
    hide_password()
    from batchmill.commands.app import main as run_command

    run_command()


if __name__ == "__main__":
    main()
