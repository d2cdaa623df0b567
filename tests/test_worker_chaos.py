"""The short form of `make chaos`: everything is killed at random, and nothing is lost or doubled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_dataset_survives_whatever_is_killed(tmp_path):
    options = ["--requests", "1500", "--events", "8", "--seed", "7"]
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong" in done.stdout
