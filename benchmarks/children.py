"""Python processes that a benchmark starts: they find this repository and nothing by accident."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from queue_api.connection.child_process import child_environment, python_module

__all__ = ["ROOT", "environment", "module"]

ROOT = Path(__file__).resolve().parents[1]


def module(name: str, *arguments: str | Path, python: str = sys.executable) -> list[str]:
    """A command that runs a module of this repository or an installed one; give it `environment`.

    :param python: another one, which has a peer's library and may be too old for `-P`
    """
    if python == sys.executable:
        return python_module(name, *map(str, arguments))
    return [python, "-m", name, *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with the repository on PYTHONPATH and no current directory."""
    found = child_environment({"PYTHONSAFEPATH": "1", **more})
    others = found.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(ROOT), *(entry for entry in others if entry and entry != str(ROOT))]
    return {**found, "PYTHONPATH": os.pathsep.join(path)}
