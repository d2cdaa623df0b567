"""What a container leaves: files as Linux writes them, in a folder in place of /sys/fs/cgroup."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.control_group import cpus_allowed, memory_left

MIB = 2**20


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own"
    path.write_text("0::/\n")
    return path


def stat(**fields: int) -> str:
    return "\n".join(f"{name} {value}" for name, value in fields.items())


def test_the_page_cache_counts_as_free(tmp_path: Path, own: Path) -> None:
    group(
        tmp_path,
        memory__max=1000 * MIB,
        memory__current=900 * MIB,
        memory__stat=stat(
            anon=200 * MIB, inactive_file=300 * MIB, active_file=350 * MIB, shmem=50 * MIB
        ),
    )
    assert memory_left(tmp_path, own) == 750 * MIB


def test_the_tightest_group_of_those_above_counts(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/pod/box\n")
    group(tmp_path / "pod/box", memory__max="max", memory__current=5, cpu__max="max 100000")
    group(tmp_path / "pod", memory__max=100, memory__current=30, cpu__max="50000 100000")
    group(tmp_path)
    assert memory_left(tmp_path, own) == 70
    assert cpus_allowed(tmp_path, own) == 1


@pytest.mark.parametrize("is_seen_by_name", [True, False])
def test_version_1(tmp_path: Path, own: Path, is_seen_by_name: bool) -> None:
    own.write_text("9:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x\n")
    folder = "docker/x" if is_seen_by_name else ""
    group(
        tmp_path / "memory" / folder,
        memory__limit_in_bytes=1000,
        memory__usage_in_bytes=700,
        memory__stat=stat(cache=500, total_inactive_file=100, total_active_file=200),
    )
    group(tmp_path / "cpu" / folder, cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert memory_left(tmp_path, own) == 600
    cpus = len(os.sched_getaffinity(0))
    assert cpus_allowed(tmp_path, own) == cpus
    group(tmp_path / "cpu" / folder, cpu__cfs_quota_us=150000, cpu__cfs_period_us=100000)
    assert cpus_allowed(tmp_path, own) == min(2, cpus)


@pytest.mark.parametrize("limit", ["max", "", "x", None])
def test_without_a_limit_there_is_none(tmp_path: Path, own: Path, limit: str | None) -> None:
    if limit is not None:
        group(tmp_path, memory__max=limit, memory__current=5, cpu__max=f"{limit} 100000")
    assert memory_left(tmp_path, own) is None
    assert cpus_allowed(tmp_path, own) == len(os.sched_getaffinity(0))
    assert memory_left(tmp_path, tmp_path / "not Linux") is None


THREADS = """
import sys
from pathlib import Path
import engine.control_group as control_group
found = control_group.cpus_allowed(Path(sys.argv[1]), Path(sys.argv[2]))
control_group.cpus_allowed = lambda: found
print(control_group.default_threads())
"""


@pytest.mark.parametrize(("given", "expected"), [(None, 1), ("2", 2)])
def test_threads_follow_the_share_of_cpus_unless_somebody_says_how_many(
    tmp_path: Path, own: Path, given: str | None, expected: int
) -> None:
    group(tmp_path, cpu__max="80000 100000")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if given is not None:
        environment["OMP_NUM_THREADS"] = given
    command = [sys.executable, "-c", THREADS, str(tmp_path), str(own)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert int(done.stdout) == min(expected, len(os.sched_getaffinity(0)))
