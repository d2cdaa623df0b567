"""How much memory a device has left, and how many cache slots fit into it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from engine.control_group import memory_left

__all__ = [
    "CACHE_SHARE",
    "anonymous_bytes",
    "available_bytes",
    "fitting_slots",
]

# Of what is free once the weights are loaded. A CPU's memory belongs to other programs too.
CACHE_SHARE = {"cpu": 0.25, "cuda": 0.85}


def available_bytes(device: torch.device) -> int:
    """Bytes free on a device; on the CPU, within the container's limit if there is one."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        # What torch keeps of memory that was freed, as by the check of a stage, is ours as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass  # not Linux
    left = memory_left()
    return free if left is None else min(free, left)


def fitting_slots(stages: Iterable[tuple[torch.device, int]]) -> int | None:
    """Cache slots that fit on every device; None if no stage needs any.

    :param stages: the device of each stage and the bytes that one slot takes there
    """
    slot_bytes: dict[torch.device, int] = defaultdict(int)
    for device, size in stages:
        slot_bytes[device] += size
    return min(
        (
            int(available_bytes(device) * CACHE_SHARE.get(device.type, 0.25)) // size
            for device, size in slot_bytes.items()
            if size
        ),
        default=None,
    )


def anonymous_bytes() -> int:
    """Memory of this process that no file is behind; 0 where the system doesn't tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    field = status.partition("RssAnon:")[2].split()
    return int(field[0]) * 1024 if field else 0
