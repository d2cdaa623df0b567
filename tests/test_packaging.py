"""The distribution as producers install it: no extras, hence no torch."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True, timeout=240)
    (built,) = folder.glob("batchmill-*.whl")
    return built


@pytest.fixture(scope="module")
def base_install(wheel, tmp_path_factory) -> Path:
    """The folder of programs of a virtual environment with batchmill and no extras."""
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder, with_pip=True)
    constraints = ROOT / "constraints.txt"
    command = [folder / "bin/python", "-m", "pip", "install", "--quiet", "-c", constraints, wheel]
    subprocess.run(command, check=True, timeout=240)
    return folder / "bin"


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, **options
    )


def test_wheel_carries_scripts_types_and_the_demo_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"queue_api/store/scripts/emit.lua", "workers/scripts/claim.lua"} <= names
    assert {
        f"{package}/py.typed" for package in ("batchmill", "engine", "queue_api", "workers")
    } <= names
    weights = "engine/demo_model/batchmill-demo"
    assert {f"{weights}/{name}" for name in ("model.safetensors", "tokenizer.json")} <= names
    assert "batchmill/offline/report_page.html.jinja" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_base_install_has_no_torch_and_producers_do_without(base_install):
    script = (
        "import sys; from batchmill import Client, SyncClient, run_dataset; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert run(base_install / "python", "-c", "import torch").returncode != 0
    assert run(base_install / "python", "-c", script).returncode == 0


def test_base_install_submits_and_reports(base_install, server, connection, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "one"}\n{"prompt": ""}\n')
    batchmill = base_install / "batchmill"
    submitted = run(batchmill, "submit", rows, "--run", "r1", "--redis-url", server.url)
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.strip() == "r1"
    status = run(batchmill, "status", "r1", "--json", "--redis-url", server.url)
    assert status.returncode == 0, status.stderr
    assert '"total":2' in status.stdout.replace(" ", "")
    results = run(batchmill, "results", "r1", "--no-follow", "--redis-url", server.url)
    assert results.returncode == 3, "the empty prompt has its result, the other row has none yet"
    assert len(results.stdout.splitlines()) == 1


@pytest.mark.parametrize("command", [["worker"], ["run", "rows.jsonl", "-o", "out.jsonl"]])
def test_commands_that_need_torch_say_what_to_install(base_install, command, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n')
    ended = run(base_install / "batchmill", *command, cwd=tmp_path)
    assert ended.returncode == 2
    assert "pip install 'batchmill[worker]'" in ended.stderr
    assert "Traceback" not in ended.stderr
