"""Files at addresses such as s3://, gs://, hf:// or https://, as far as fsspec knows them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from queue_api.datasets.formats.byte_input import (
    BLOCK_BYTES,
    START_BYTES,
    ByteInput,
    Window,
    spooled,
)
from queue_api.datasets.formats.data_files import Folder, chosen_files
from queue_api.datasets.formats.packages import import_fsspec
from queue_api.wire.errors import BatchmillError, DatasetError, MissingExtraError

__all__ = ["RemoteInput", "is_address", "local_path", "remote_files"]

_PASSWORD = re.compile(r"(?<=://)[^/@:]*:[^/@]*@")
_HTTP = ("http", "https")
_TELLING = ("size", "etag", "ETag", "mtime", "LastModified", "last_modified", "created", "md5Hash")


def is_address(name: str) -> bool:
    """True of what isn't a file of this machine."""
    return "://" in name and not os.path.lexists(name)


def local_path(name: str) -> str:
    """The path that an address file:// names; any other name is itself."""
    parts = urlsplit(name) if name.startswith("file://") else None
    return name if parts is None else url2pathname(parts.path)


def remote_files(address: str) -> list[str]:
    """The files that an address, a pattern in one or a folder stands for, in order.

    :raises DatasetError: it can't be reached, or has no data that goes together
    """
    files, path = _reach(address)
    name = _shown(address)
    with _told(name):
        if "*" in path and not _is_http(address):
            found = sorted(files.glob(path))
            if not found:
                raise DatasetError(f"no file matches {name!r}")
            return [files.unstrip_protocol(each) for each in found if not files.isdir(each)]
        if _is_http(address) or not files.isdir(path):
            return [address]
        root = path.rstrip("/")
        below = sorted(each[len(root) :].lstrip("/") for each in files.find(root))
        chosen = chosen_files(Folder(name, below, lambda each: files.cat_file(f"{root}/{each}")))
        return [files.unstrip_protocol(f"{root}/{each}") for each in chosen]


class RemoteInput(ByteInput):
    """A file that comes over a network, or whatever else fsspec reads."""

    def __init__(self, address: str) -> None:
        super().__init__(_shown(address))
        self._files, self._path = _reach(address)
        self._options = {"block_size": 0} if _is_http(address) else {}
        self._is_interrupted = False
        self._spool: BinaryIO | None = None
        with _told(self.name):
            self._info = self._files.info(self._path)

    def start(self) -> bytes:
        with _told(self.name), self._open() as file:
            found = b""
            while len(found) < START_BYTES and (more := file.read(START_BYTES - len(found))):
                found += more
            return found

    def blocks(self) -> Iterator[bytes]:
        with _told(self.name), self._open() as file:
            num_bytes = 0
            while not self._is_interrupted and (block := file.read(BLOCK_BYTES)):
                num_bytes += len(block)
                yield block
            size = self._info.get("size")
            if not self._is_interrupted and size is not None and num_bytes < size:
                raise DatasetError(
                    f"can't read all of {self.name}: {num_bytes} of {size} bytes came"
                )

    def file(self) -> BinaryIO:
        """A copy: all of it is read anyway, and not every server lets one choose a place."""
        if self._spool is None:
            self._spool = spooled(self)
        return io.BufferedReader(Window(self._spool.fileno(), 0), BLOCK_BYTES)

    def identity(self) -> list[str]:
        """Address, size, version and time, as far as the server tells, and the first bytes."""
        told = [f"{key}={self._info[key]}" for key in _TELLING if self._info.get(key) is not None]
        with contextlib.suppress(Exception):  # whatever a file system raises that has none
            told.append(str(self._files.ukey(self._path)))
        start = hashlib.blake2b(self.start(), digest_size=16).hexdigest()
        return [self.name, *told, start]

    def interrupt(self) -> None:
        self._is_interrupted = True

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()

    def _open(self) -> Any:
        return self._files.open(self._path, "rb", **self._options)


def _reach(address: str) -> tuple[Any, str]:
    """The file system, and the path in it.

    :raises MissingExtraError: the package for it isn't installed
    :raises DatasetError: there is none
    """
    name = _shown(address)
    fsspec = import_fsspec(name)
    with _told(name):
        try:
            files, path = fsspec.url_to_fs(address)
        except ImportError as error:
            package = _package_for(address.partition("://")[0])
            raise MissingExtraError(
                f"{name} needs a package that isn't installed ({error}): pip install {package}"
            ) from None
        return files, str(path)


def _package_for(protocol: str) -> str:
    from fsspec.registry import known_implementations

    module = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
    return "'batchmill[files]'" if module in ("", "fsspec") else module


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Tells of whatever a file system raises, in a line, as of an error of ours."""
    try:
        yield
    except BatchmillError:
        raise
    except FileNotFoundError:
        raise DatasetError(f"can't read {name}: there is no such file") from None
    except Exception as error:
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise DatasetError(f"can't read {name}: {words}") from None


def _is_http(address: str) -> bool:
    return address.partition("://")[0] in _HTTP


def _shown(address: str) -> str:
    """Without passwords and what signs it."""
    shown = _PASSWORD.sub("", address)
    return shown.partition("?")[0] if _is_http(address) else shown
