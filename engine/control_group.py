"""What a container leaves this process of the machine: the limits of its Linux control groups.

Both versions are read: `memory.max` and `cpu.max` of version 2, `memory.limit_in_bytes` and
`cpu.cfs_quota_us` of version 1; of this process's group and of all that are above it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpus_allowed", "default_threads", "memory_left"]

MOUNT = Path("/sys/fs/cgroup")
UNLIMITED = 2**62
"""Version 1 has no word for it, but the largest multiple of a page."""
OWN_GROUPS = Path("/proc/self/cgroup")


def memory_left(mount: Path = MOUNT, own_groups: Path = OWN_GROUPS) -> int | None:
    """Bytes that may still be allocated; None where there is no limit.

    What the page cache holds counts as free, as it does in MemAvailable: a checkpoint that was
    read or mapped gives way.
    """
    left: list[int] = []
    for group in _groups("memory", mount, own_groups):
        stat = _fields(group / "memory.stat")
        limit, used = _number(group / "memory.max"), _number(group / "memory.current")
        names = ("inactive_file", "active_file", "slab_reclaimable")
        if limit is None or used is None:
            limit = _number(group / "memory.limit_in_bytes")
            used = _number(group / "memory.usage_in_bytes")
            names = ("total_inactive_file", "total_active_file", "")
        if limit is not None and used is not None and limit < UNLIMITED:
            left.append(max(0, limit - max(0, used - sum(stat.get(name, 0) for name in names))))
    return min(left, default=None)


def cpus_allowed(mount: Path = MOUNT, own_groups: Path = OWN_GROUPS) -> int:
    """CPUs that this process may use at a time, a part of one counted as one."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    for group in _groups("cpu", mount, own_groups):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if not quota:
            quota = _text(group / "cpu.cfs_quota_us")
            period = _text(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):
            cpus = min(cpus, max(1, math.ceil(int(quota) / int(period))))
    return cpus


def default_threads() -> int:
    """The threads that torch would use, but no more than there are CPUs for.

    torch doesn't look at a container's share of CPUs: too many threads would wait for each other.
    """
    import torch  # here: a command that only counts CPUs starts without it

    threads = torch.get_num_threads()
    return threads if "OMP_NUM_THREADS" in os.environ else min(threads, cpus_allowed())


def _groups(controller: str, mount: Path, own_groups: Path) -> Iterator[Path]:
    """The folders of this process's group and of those above it, by either version."""
    for line in _text(own_groups).splitlines():
        _, controllers, name = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            root = mount
        elif controller in controllers.split(","):
            root = mount / controller
        else:
            continue
        # a container may see its own group as the root, but not under its name
        parts = [part for part in name.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth])


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None  # else "max", or no such file


def _fields(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
