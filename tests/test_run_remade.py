"""`batchmill verify --sample`: rows made again by another partition, as a user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from batchmill.commands.app import app
from batchmill.commands.options import exit_code_of
from queue_api.wire.errors import BatchmillError

ROOT = Path(__file__).parent.parent
PATIENCE_S = 180
UNEVEN = ("--stages", "cpu,cpu,cpu", "--partition", "custom", "--layer-bounds", "1,3")
STORY = "Write a short story with the words key, cave and wolf."
ROWS: list[dict[str, Any]] = [
    {"prompt": STORY, "max_tokens": 24, "temperature": 1.0},
    {"prompt": "What is 2 + 3?", "max_tokens": 8, "n": 3, "temperature": 1.2, "seed": 5},
    {"id": "x", "messages": [{"role": "user", "content": "Say river 3 times."}], "logprobs": 2},
    {"prompt": STORY, "max_tokens": 60, "stop": [". "], "return_token_ids": True},
    {"prompt": "", "max_tokens": 4},
    {"prompt": "x", "max_tokens": 1_000_000},
    {"prompt": STORY, "max_tokens": 20, "repetition_penalty": 1.3, "temperature": 0.8, "top_k": 9},
    {"prompt": "Pick: ", "structured_outputs": {"choice": ["red", "blue"]}, "text": "mine"},
    {"prompt": "Write a poem.", "max_tokens": 12, "n": 2, "temperature": 1.0},
    {"prompt": "Sort these numbers: 57, 26, 98.", "max_tokens": 16},
]
GREEDY, DRAWN, SEVERAL, CHOICE = 9, 0, 8, 7
UNREADABLE = len(ROWS)


def run(folder: Path, *arguments: str) -> None:
    """`batchmill run` with the demo model, in processes of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "batchmill", "run", *arguments, "--model", "demo"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


@dataclass
class Ended:
    code: int
    out: str
    err: str


def verify(folder: Path, *arguments: str) -> Ended:
    """`batchmill verify` in this process: the engine is loaded without that of a new Python."""
    with contextlib.chdir(folder):
        ended = CliRunner().invoke(app, ["verify", *arguments])
    if isinstance(ended.exception, BatchmillError):
        return Ended(exit_code_of(ended.exception), ended.stdout, str(ended.exception))
    return Ended(ended.exit_code, ended.stdout, ended.stderr)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with in.jsonl and what one stage made of it."""
    folder = tmp_path_factory.mktemp("made")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS) + "not JSON\n"
    (folder / "in.jsonl").write_text(lines)
    run(folder, "in.jsonl", "-o", "out.jsonl")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    for file in made.iterdir():
        shutil.copy(file, tmp_path / file.name)
    return tmp_path


def change(folder: Path, row: int, edit: Callable[[dict[str, Any]], object]) -> None:
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    edit(next(line for line in lines if line["row"] == row))
    (folder / "out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_all_rows_are_equal_under_another_partition(made: Path) -> None:
    ended = verify(made, "out.jsonl", "--sample", "100%", "--input", "in.jsonl", *UNEVEN)
    assert (ended.code, ended.out) == (0, ""), ended.err
    assert "of 11 rows of the sample 11 equal, 0 near-tie, 0 different" in ended.err


def test_an_output_tells_what_was_asked_but_for_what_it_lacks(made: Path) -> None:
    ended = verify(made, "out.jsonl", "--sample", "100%", "--model", "demo")
    assert ended.code == 0, ended.err
    assert "10 equal, 0 near-tie, 0 different, 1 not made again" in ended.err
    assert f"row {UNREADABLE}: not made again" in ended.out
    assert "--input in.jsonl" in ended.out


def test_texts_that_the_model_did_not_make_are_different(folder: Path) -> None:
    change(folder, GREEDY, lambda row: row.update(text=row["text"] + "!"))
    change(folder, DRAWN, lambda row: row.update(text=row["text"].replace(" ", "  ", 1)))
    change(folder, SEVERAL, lambda row: row["outputs"][1].update(text="a poem"))
    change(folder, CHOICE, lambda row: row.update(finish_reason="length"))
    change(folder, 3, lambda row: row["token_ids"].append(3))
    change(folder, 2, lambda row: row["logprobs"][0].update(logprob=-7.0))
    change(folder, 6, lambda row: row.update(seed_key="another/6"))
    change(folder, 5, lambda row: row.update(prompt="y"))
    ended = verify(folder, "out.jsonl", "--sample", "100%", "--model", "demo")
    assert ended.code == 3, ended.err
    told = ended.out
    for row in (GREEDY, DRAWN, SEVERAL, CHOICE, 3, 2, 6):
        assert f"row {row}: different" in told
        assert f"row {row} has changed" in told  # as the certificate tells, too
    assert "row 5: not made again: its columns" in told
    assert "2 equal, 0 near-tie, 7 different, 2 not made again" in ended.err


def test_a_sample_is_fixed_by_its_seed_and_made_of_the_rows_there_are(made: Path) -> None:
    command = ("out.jsonl", "--sample", "4", "--model", "demo", "--seed")
    ended = verify(made, *command, "3")
    assert ended.code == 0, ended.err
    assert "of 4 rows of the sample" in ended.err
    wrong = verify(made, "out.jsonl", "--sample", "0", "--model", "demo")
    assert wrong.code == 2
    assert "must be at least 1" in wrong.err


def test_what_cannot_be_made_again_is_refused_by_name(folder: Path) -> None:
    other = verify(folder, "out.jsonl", "--sample", "2", "--model", "echo:tokens=3")
    assert other.code == 2
    assert "--model" in other.err
    (folder / "other.jsonl").write_text('{"prompt": "another"}\n')
    ended = verify(folder, "out.jsonl", "--sample", "2", "--input", "other.jsonl")
    assert ended.code == 2
    assert "none of 2 rows can be made again: the input" in ended.err
    ended = verify(folder, "out.jsonl", "--stages", "cpu,cpu")
    assert ended.code == 2
    assert "--sample" in ended.err
    (folder / "out.jsonl.certificate.json").unlink()
    ended = verify(folder, "out.jsonl", "--sample", "2")
    assert ended.code == 2
    assert "no certificate" in ended.err


@pytest.mark.parametrize(
    ("output", "options", "needs_input"),
    [
        (
            "out.parquet",
            ("--prompt-column", "question", "--errors", "wrong.jsonl", "--errors-only-apart"),
            False,
        ),
        ("out.jsonl", ("--template", "{{ question }}", "--output-format", "openai"), True),
        ("out.jsonl", ("--turns-column", "turns", "--system", "Be brief."), False),
    ],
)
def test_formats_and_layouts(
    output: str, options: tuple[str, ...], needs_input: bool, tmp_path: Path
) -> None:
    rows = [
        {"question": "What is 2 + 3?", "turns": ["What is 2 + 3?", "And 4 + 4?"], "text": "mine"},
        {"question": "Say river 3 times.", "turns": ["Say river 3 times."]},
        {"question": "", "turns": []},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path, "in.jsonl", "-o", output, *options, "--max-tokens", "12")
    again = (output, "--sample", "100%", "--model", "demo", "--stages", "cpu,cpu")
    alone = verify(tmp_path, *again)
    with_input = verify(tmp_path, *again, "--input", "in.jsonl")
    assert with_input.code == 0, with_input.err
    assert "of 3 rows of the sample 3 equal" in with_input.err
    if needs_input:
        assert alone.code == 2
        assert "--input in.jsonl" in alone.err
    else:
        assert alone.code == 0, alone.err
        assert "of 3 rows of the sample 3 equal" in alone.err
