"""`decode_attention.c`, compiled for this machine's CPU once, and called with checked arguments.

A batch's single new tokens otherwise cost one SDPA call per sequence and layer. Without a C
compiler everything runs as well, only slower; the log says so once. `CC` names the compiler, as
it does for other builds, so `CC=false` does without.
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

import torch

__all__ = ["DecodeAttention", "decode_attention"]

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("decode_attention.c")
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


class DecodeAttention:
    """Attention of a batch's single new tokens, over the keys and values of one layer's pool."""

    def __init__(self, library: Path) -> None:
        self._function = ctypes.CDLL(str(library)).attend_decodes
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._function.argtypes = [
            *(pointer, size, size, pointer, pointer, pointer),
            *(size, size, size, size, size, ctypes.c_float),
            *(pointer, size, size, ctypes.c_int),
        ]
        self._function.restype = ctypes.c_int

    @staticmethod
    def takes(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether these are what the C code reads: float32 on a CPU, rows without gaps."""
        return (
            all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (query, keys, values))
            and query.stride(-1) == 1
            and keys.is_contiguous()
            and values.is_contiguous()
            and keys.shape[:2] == values.shape[:2]
            and query.shape[-1] == keys.shape[-1]
            and query.shape[0] % keys.shape[0] == 0
        )

    def __call__(  # noqa: PLR0917 - as many as attention has
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        spans: torch.Tensor,
        scale: float,
    ) -> None:
        """Write the spans' rows of `out`.

        :param query: [H, T, D] that `takes` accepts with `keys` [Hkv, S, D], `values` [Hkv, S, Dv]
        :param out: [T, H, Dv] contiguous
        :param spans: [n, 3] int64, each a row of T, its first slot and the slot after its last
        :raises ValueError: if a span lies outside the tensors
        """
        num_heads, num_rows, key_size = query.shape
        num_kv, num_slots, value_size = values.shape
        rows, first, end = spans.unbind(1)
        lengths = end - first
        lowest = min(int(rows.min()), int(first.min()), int(lengths.min()) - 1)
        if lowest < 0 or int(rows.max()) >= num_rows or int(end.max()) > num_slots:
            raise ValueError(f"spans outside {num_rows} rows and {num_slots} slots: {spans}")
        if not out.is_contiguous() or out.shape != (num_rows, num_heads, value_size):
            raise ValueError(f"out of shape {tuple(out.shape)} isn't contiguous [T, H, Dv]")
        failed = self._function(
            *(query.data_ptr(), query.stride(0), query.stride(1)),
            *(keys.data_ptr(), values.data_ptr(), out.data_ptr()),
            *(num_kv, num_heads // num_kv, num_slots, key_size, value_size, scale),
            *(spans.data_ptr(), len(spans), int(lengths.max()), torch.get_num_threads()),
        )
        if failed:
            raise MemoryError(f"no memory for the scores of {int(lengths.max())} keys")


@functools.cache
def decode_attention() -> DecodeAttention | None:
    """The compiled function; None where it can't be had. The log says which, once.

    The check of a stage that loads asks for it first, so no request waits for the compiler.
    """
    try:
        compiled = DecodeAttention(_library())
    except (OSError, subprocess.SubprocessError, AttributeError) as problem:
        logger.warning(
            "no compiled attention, decoding is slower (%s); install a C compiler such as gcc",
            problem,
        )
        return None
    logger.info("single new tokens: compiled attention")
    return compiled


def _library() -> Path:
    """The compiled library's path, kept in the user's cache from the first use on.

    Named by everything that it is made from, the CPU included: a home may be shared by machines.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    parts = (SOURCE.read_bytes(), shlex.join([*compiler, *FLAGS]).encode(), _cpu())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchmill"
    library = cache / f"decode_attention-{name}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Renamed once whole, so processes that start together can't load half a file.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / "built.so"
            subprocess.run(
                [*compiler, *FLAGS, str(SOURCE), "-o", str(built)],
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
