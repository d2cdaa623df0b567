"""`batchmill run --redo`: which rows of an output that is there are made anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATIENCE_S = 120
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def again(tmp_path: Path) -> Run:
    """Runs in.jsonl to out.jsonl with an engine that echoes."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["run", "in.jsonl", "-o", "out.jsonl", "--model", "echo:tokens=3", *arguments]
        return subprocess.run(
            [sys.executable, "-m", "batchmill", *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    return run


def makers(folder: Path) -> dict[int, str]:
    """By row: which worker process made it."""
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len({row["row"] for row in rows}) == len(rows)
    return {row["row"]: row["worker"] for row in rows if row["finish_reason"] != "error"}


def write(folder: Path, *prompts: str) -> None:
    rows = ({"id": place, "prompt": prompt} for place, prompt in enumerate(prompts))
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_changed_errors_and_all(again: Run, tmp_path: Path) -> None:
    write(tmp_path, "a b", "c d", "e f", "")
    assert again().returncode == 0
    first = makers(tmp_path)
    write(tmp_path, "a b", "c d", "another", "")
    refused = again()
    assert refused.returncode == 2
    assert "--redo changed" in refused.stderr
    assert again("--redo", "changed").returncode == 0
    second = makers(tmp_path)
    assert {row for row in first if second[row] != first[row]} == {2}
    ended = again("--redo", "errors", "--redo", "changed")
    assert ended.returncode == 0
    assert makers(tmp_path) == second
    assert "rows written before │      3" in ended.stderr
    assert again("--redo", "all", "--limit", "2").returncode == 0
    third = makers(tmp_path)
    assert {row for row in second if third[row] != second[row]} == {0, 1}
    assert again("--redo", "all").returncode == 0
    assert not set(makers(tmp_path).values()) & {*third.values()}


def test_all_is_refused_where_something_would_be_taken_over(again: Run, tmp_path: Path) -> None:
    write(tmp_path, "a b")
    ended = again("--redo", "all", "--cache", "kept")
    assert ended.returncode == 2
    assert "--cache" in ended.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_recipe_has_the_same_but_for_all(again: Run, tmp_path: Path) -> None:
    write(tmp_path, "a b", "c d")
    recipe = "in: in.jsonl\nout: of.jsonl\nmodel: echo:tokens=3\nstages:\n- name: one\n"
    (tmp_path / "r.yaml").write_text(recipe)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "batchmill", "run", "r.yaml", *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    assert run().returncode == 0
    write(tmp_path, "a b", "another")
    changed = run("--redo", "changed")
    assert changed.returncode == 0, changed.stderr
    assert "another" in (tmp_path / "of.jsonl").read_text()
    ended = run("--redo", "all")
    assert ended.returncode == 2
    assert "isn't for recipes" in ended.stderr
