"""The engine's C sources compiled for this CPU, or for older ones of its kind."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.kernels.native_library import native_library

OLDER = ["", "-mno-avx512f", "-mno-avx"] if platform.machine() == "x86_64" else [""]
"""Compiler flags that leave out what newer CPUs have; the first leaves out nothing."""


def on_threads(count: int) -> Iterator[None]:
    """For a fixture: torch, and so the C code, has `count` threads while it is in use."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def compiled(name: str, flag: str, cache: Path) -> ctypes.CDLL:
    """The library made of `name`.c with a flag of `OLDER`; skips the test without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        if flag:
            patch.setenv("CC", f"{os.environ.get('CC') or 'cc'} {flag}")
            patch.setenv("XDG_CACHE_HOME", str(cache))
        library = native_library.__wrapped__(name)
    if library is None:
        pytest.skip("no C compiler here")
    return library
