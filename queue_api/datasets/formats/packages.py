"""Packages of the extra `files`, imported when the first input or output needs one."""

from __future__ import annotations

import sys
from typing import Any

from queue_api.wire.errors import MissingExtraError

__all__ = ["import_fsspec", "import_pyarrow", "import_zstd"]


def import_pyarrow(name: str) -> Any:
    """pyarrow, with what it reads Parquet with.

    :param name: of the input or output that needs it
    :raises MissingExtraError: it isn't there
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise _missing(f"{name} needs pyarrow, which") from None
    return pyarrow


def import_fsspec(name: str) -> Any:
    """fsspec; as import_pyarrow."""
    try:
        import fsspec
    except ImportError:
        raise _missing(f"{name} needs fsspec, which") from None
    return fsspec


def import_zstd() -> Any:
    """The standard library's module, or its backport.

    :raises MissingExtraError: it isn't there
    """
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise _missing("zstd needs a package that") from None
    return zstd


def _missing(what: str) -> MissingExtraError:
    return MissingExtraError(f"{what} isn't installed: pip install 'batchmill[files]'")
