"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

__all__ = ["give_back_freed_memory", "keep_freed_memory"]


def give_back_freed_memory() -> None:
    """Give free memory back to the system, or what is loaded next would seem to need none."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


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
