"""Sees that `workers`, `engine` and `queue_api` are ours: names as general are met by accident."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["strangers"]

_OURS = ("queue_api", "engine", "workers")


def strangers() -> str:
    """What to say of a package of such a name that would be imported in place of ours; or nothing.

    None of them is imported for that.
    """
    home = Path(__file__).resolve().parent.parent
    for name in _OURS:
        spec = importlib.util.find_spec(name)
        if spec is None:
            return f"the package {name!r} isn't installed beside batchmill in {home}"
        places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
        if not any(home in Path(place).resolve().parents for place in places):
            return (
                f"another package named {name!r} is found first, {places[0]}; batchmill's own is "
                f"in {home}: take the other's folder off PYTHONPATH, or start elsewhere"
            )
    return ""
