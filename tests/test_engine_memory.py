"""Memory that a step frees is there for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from engine.kernels.malloc import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.ones(5 << 20) for _ in range(3)]  # 20 MiB each
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

without = faults()
keep_freed_memory()
faults()
print(without, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_is_used_again_without_asking_the_system():
    # In a process of its own, for it can't be undone.
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True, text=True)
    without, kept = map(int, run.stdout.split())
    assert kept < without / 10
