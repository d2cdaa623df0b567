"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection

__all__ = ["cores", "names_among", "peer_python"]


def names_among(known: Collection[str]) -> Callable[[str], list[str]]:
    """A parser of `a,b` that takes only known names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse


def cores(text: str) -> list[int]:
    """`0,1` as core numbers."""
    return [int(core) for core in text.split(",")]


def peer_python(text: str) -> tuple[str, str]:
    """`PEER=PYTHON` as the two."""
    peer, _, python = text.partition("=")
    if not python:
        raise argparse.ArgumentTypeError(f"{text!r} isn't PEER=PYTHON")
    return peer, python
