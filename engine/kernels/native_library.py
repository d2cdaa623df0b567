"""C sources of this package, compiled for this machine's CPU once.

Without a C compiler everything runs as well, only slower; the log says so once. `CC` names the
compiler, as it does for other builds, so `CC=false` does without.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

__all__ = ["native_library"]

logger = logging.getLogger(__name__)

# No -ffast-math: a library linked with it changes how the whole process treats tiny numbers.
FLAGS = [
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
]
BUILD_TIMEOUT_S = 60


@functools.cache
def native_library(name: str) -> ctypes.CDLL | None:
    """The library made of `name`.c beside this file; None where it can't be had.

    The check of a stage that loads asks for it first, so no request waits for the compiler.
    """
    try:
        library = ctypes.CDLL(str(_library(Path(__file__).with_name(f"{name}.c"))))
    except (OSError, subprocess.SubprocessError) as problem:
        logger.warning(
            "no native %s, the engine is slower (%s); install a C compiler such as gcc",
            name.replace("_", " "),
            problem,
        )
        return None
    logger.info("compiled %s", name.replace("_", " "))
    return library


def _library(source: Path) -> Path:
    """The compiled library's path, kept in the user's cache from the first use on.

    Named by everything that it is made from, the CPU included: a home may be shared by machines.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    headers = [header.read_bytes() for header in sorted(source.parent.glob("*.h"))]
    command = shlex.join([*compiler, *FLAGS]).encode()
    parts = (source.read_bytes(), *headers, command, _cpu())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchmill"
    library = cache / f"{source.stem}-{digest}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Renamed once whole, so processes that start together can't load half a file.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / "built.so"
            subprocess.run(
                [*compiler, *FLAGS, str(source), "-o", str(built)],
                check=True,
                capture_output=True,
                timeout=BUILD_TIMEOUT_S,
            )
            built.replace(library)
    return library


def _cpu() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    wanted = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(sorted({line for line in lines if line.startswith(wanted)}))
