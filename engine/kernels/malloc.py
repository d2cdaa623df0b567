"""What the C library and the system do with memory that isn't needed any more."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["give_back_freed_memory", "give_back_mapped_files", "keep_freed_memory"]


def give_back_freed_memory(*, collect: bool = True) -> None:
    """Give free memory back to the system, or what is loaded next would seem to need none.

    :param collect: what only cycles hold, too; takes as long as there are objects
    """
    if collect:
        gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


_MADV_DONTNEED = 4
_SMAPS = Path("/proc/self/smaps")


def give_back_mapped_files(files: Collection[Path]) -> None:
    """Let go of the pages of mapped files that this process has touched.

    They are read again from the file when they are used again. Mappings that were written to are
    left alone, and without Linux's /proc all are.
    """
    paths = {os.path.realpath(path) for path in files}
    with suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, end in list(_clean_mappings(paths)):
            madvise(start, end - start, _MADV_DONTNEED)


def _clean_mappings(paths: Collection[str]) -> Iterator[tuple[int, int]]:
    """First and last address of each mapping of `paths` with no page of this process's own."""
    found: tuple[int, int] | None = None
    for line in _SMAPS.read_text(errors="replace").splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):  # 7f00-7f08 r--p 00000000 08:01 1234   /path/of/the file
            parts = rest.split(maxsplit=4)
            bounds = first.split("-")
            is_ours = len(parts) == 5 and parts[4] in paths
            found = (int(bounds[0], 16), int(bounds[1], 16)) if is_ours else None
        elif found is not None and first == "Anonymous:":
            if rest.split()[0] == "0":
                yield found
            found = None


# Of malloc.h. The first is the largest that glibc takes.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_MMAP_THRESHOLD_BYTES = 32 << 20
_TRIM_THRESHOLD_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let this process keep what a step's activations took, for the next step's.

    glibc gives large pieces back to the system when they are freed, which then has to find and
    clear their pages anew: on M1 of the benchmarks half of the pages that the first texts touched,
    and 3 to 4 % of their time. Elsewhere than with glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
