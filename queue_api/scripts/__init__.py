"""The Lua scripts of producers and of runs, each documented in its own file."""

from __future__ import annotations

from functools import cache
from pathlib import Path

__all__ = ["load_script"]


@cache
def load_script(name: str, folder: Path = Path(__file__).parent) -> str:
    """The source of `<name>.lua`, ready for `register_script`."""
    return (folder / f"{name}.lua").read_text(encoding="utf-8")
