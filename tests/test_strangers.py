"""The current directory is data: what lies there is never run, by us or by a child of ours."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kits.house import ROOT, modules

from queue_api.connection.child_process import child_environment, python_module

BATCHMILL = Path(sys.executable).parent / "batchmill"
NAMES = ("workers", "engine", "queue_api", "batchmill", "benchmarks", "rq", "torch")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with packages of our names, each of which says so when it is run."""
    for name in NAMES:
        (tmp_path / name).mkdir()
        for file in ("__init__.py", "__main__.py"):
            mark = tmp_path / f"{name}.was.run"
            (tmp_path / name / file).write_text(f"open({str(mark)!r}, 'w').close()\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    return tmp_path


def strangers_run(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.was.run"))


@pytest.mark.parametrize("pythonpath", [None, "", f"{os.pathsep}/nowhere"], ids=repr)
def test_a_run_in_a_folder_of_strangers_does_the_job(hostile: Path, pythonpath: str | None) -> None:
    """An empty entry on PYTHONPATH is the current directory; ours is a program that ignores it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [BATCHMILL, "run", "rows.jsonl", "-o", "out.jsonl", "--model", "echo:tokens=2"]
    if pythonpath is not None:
        environment["PYTHONPATH"] = pythonpath
        # as the interpreter starts, it imports nothing of ours; the program itself is run so
        command = [sys.executable, "-c", START, *map(str, command[1:])]
    ended = subprocess.run(
        command,
        cwd=hostile,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in (hostile / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert not any(row.get("error") for row in rows)
    assert strangers_run(hostile) == []


START = """
import os, sys
sys.path[:] = [entry for entry in sys.path if entry not in ("", os.getcwd())]
from batchmill.__main__ import main
main()
"""


def test_a_package_found_in_place_of_ours_is_told_in_one_line(hostile: Path) -> None:
    for other in ("batchmill", "queue_api", "engine", "torch", "rq"):
        (hostile / other / "__init__.py").rename(hostile / other / "gone")
        (hostile / other / "__main__.py").unlink()
    script = f"""
import sys
import batchmill.own_packages
sys.path.insert(0, {str(hostile)!r})
from batchmill.__main__ import main
main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "another package named 'workers' is found first" in ended.stderr
    assert strangers_run(hostile) == []


@pytest.mark.parametrize("safe_path", [True, False])
def test_a_child_has_no_current_directory_on_its_path(
    hostile: Path, safe_path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}.{os.pathsep}{hostile}{os.pathsep}{ROOT}")
    if safe_path:
        monkeypatch.setenv("PYTHONSAFEPATH", "1")
    else:
        monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    ended = subprocess.run(
        python_module("batchmill", "--version"),
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("batchmill ")
    assert strangers_run(hostile) == []


def test_every_python_child_is_started_that_way() -> None:
    """So the tests above are about all of them: workers, and what the benchmarks start."""
    homes = {"queue_api/connection/child_process.py", "benchmarks/children.py"}
    files = [*modules().values(), *(ROOT / "benchmarks").rglob("*.py")]
    for path in files:
        where = path.relative_to(ROOT).as_posix()
        if where in homes:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List) and "sys.executable" in ast.unparse(node):
                assert '"-m"' not in ast.unparse(node).replace("'", '"'), where
