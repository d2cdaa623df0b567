"""The Redis that `batchmill run` starts for itself, and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from kits.worker_kit import until

from queue_api.connection.child_process import child_environment, python_module

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds it in /proc")

ROWS = 2000


def start(folder: Path, step_s: float) -> subprocess.Popen[str]:
    (folder / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": f"row {i}"}) + "\n" for i in range(ROWS))
    )
    options = ["--model", f"echo:tokens=8,step_s={step_s}"]
    unset = ("BATCHMILL_REDIS_URL", "REDIS_URL")
    return subprocess.Popen(
        python_module("batchmill", "run", "in.jsonl", "-o", "out.jsonl", *options),
        cwd=folder,
        env={name: value for name, value in child_environment().items() if name not in unset},
        stderr=subprocess.PIPE,
        text=True,
    )


def child(parent: int, is_it: Callable[[bytes], bool]) -> int | None:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/cmdline") for pid in children}
    return next((pid for pid, name in names.items() if is_it(name.read_bytes())), None)


def num_rows(folder: Path) -> int:
    path = folder / "out.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("when", ["before a worker serves", "amid the work"])
def test_a_run_whose_server_ends_says_so_and_ends(tmp_path, when, signum):
    run = start(tmp_path, 0.05)
    try:
        server = until(lambda: child(run.pid, lambda name: b"-server" in name))
        if when == "amid the work":
            until(lambda: num_rows(tmp_path) > 50)
        worker = until(lambda: child(run.pid, lambda name: b"worker" in name))
        os.kill(server, signum)
        said = run.communicate(timeout=30)[1]
        assert run.returncode == 3
        (line,) = [line for line in said.splitlines() if line.startswith("batchmill: ")]
        assert "private Redis of this run ended" in line and "same command" in line
        assert "Traceback" not in said
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    finally:
        run.kill()
    if when == "amid the work":
        assert 50 < num_rows(tmp_path) < ROWS
        again = start(tmp_path, 0)
        said = again.communicate(timeout=60)[1]
        assert again.returncode == 0, said
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert sorted(row["row"] for row in rows) == list(range(ROWS))
