"""The Lua scripts of the worker, each documented in its own file.

It may import `queue_api`. Begin with claim.lua, then finish.lua.
"""

from __future__ import annotations

from pathlib import Path

from queue_api.store.scripts import load_script, load_scripts

__all__ = ["load_worker_script", "worker_scripts"]

_FOLDER = Path(__file__).parent


def load_worker_script(name: str) -> str:
    """The source of `<name>.lua` of this folder."""
    return load_script(name, _FOLDER)


def worker_scripts() -> dict[str, str]:
    """The sources of all scripts that a worker runs on its event loop, by name."""
    return {**load_scripts(_FOLDER), "emit": load_script("emit")}
