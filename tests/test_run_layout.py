"""`batchmill run` and `submit` where the prompt isn't in `prompt`, as a user runs them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from kits.client_kit import Answerer
from transformers import AutoTokenizer

from engine.demo_model import DEMO_MODEL_PATH

ROOT = Path(__file__).parent.parent
BATCHMILL = [sys.executable, "-m", "batchmill"]
PATIENCE_S = 120

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def batchmill(tmp_path: Path) -> Run:
    """Runs a command in the test's folder, by default with an engine that echoes the prompt."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*BATCHMILL, *arguments],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "COLUMNS": "300",
                "BATCHMILL_MODEL": "echo:tokens=50",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    return run


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def echoed(row: dict[str, Any]) -> str:
    """The prompt's words, which the engine gives back again and again."""
    return " ".join(row["text"].split()[: row["usage"]["prompt_tokens"]])


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: int(row["row"]))


ROWS = [
    {"key": "k0", "question": "What is this?", "context": "A test.", "answer": "yes"},
    {"key": "k1", "question": "And that?", "context": "", "answer": "no"},
]


def test_a_template_with_a_system_turn_and_chosen_columns(batchmill: Run, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", *ROWS)
    (tmp_path / "ask.jinja").write_text(
        "{% if context %}{{ context }}\n{% endif %}Q: {{ question }}\n"
    )
    line = [
        *("run", "in.jsonl", "-o", "out.jsonl", "--template", "@ask.jinja"),
        *("--system", "Be brief.", "--id-column", "key", "--select", "answer,question"),
        *("--rename", "answer=expected"),
    ]
    done = batchmill(*line)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out.jsonl")
    assert [echoed(row) for row in rows] == [
        "Be brief. A test. Q: What is this?",
        "Be brief. Q: And that?",
    ]
    assert [[*row][:3] for row in rows] == [["id", "expected", "question"]] * 2
    assert [(row["id"], row["expected"]) for row in rows] == [("k0", "yes"), ("k1", "no")]
    assert "prompt from the template, of the columns 'context', 'question'" in done.stderr
    # the same again makes nothing anew; another template is other rows
    before = (tmp_path / "out.jsonl").read_bytes()
    assert batchmill(*line).returncode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before
    (tmp_path / "ask.jinja").write_text("{{ context }} Q: {{ question }}\n")
    done = batchmill(*line)
    assert done.returncode == 2
    assert "its row 0 was made with other options or columns" in done.stderr
    done = batchmill(*line, "--redo-changed")
    assert done.returncode == 0, done.stderr
    assert echoed(rows_of(tmp_path / "out.jsonl")[0]) == "Be brief. A test. Q: What is this?"


def test_only_the_rows_whose_rendering_changed_are_made_anew(
    batchmill: Run, tmp_path: Path
) -> None:
    write(tmp_path / "in.jsonl", *ROWS)
    line = ["run", "in.jsonl", "-o", "out.jsonl", "--redo-changed", "--template"]
    assert batchmill(*line, "{{ context }}{{ question }}").returncode == 0
    first = {row["row"]: row for row in rows_of(tmp_path / "out.jsonl")}
    done = batchmill(*line, "{% if context %}new {% endif %}{{ context }}{{ question }}")
    assert done.returncode == 0, done.stderr
    second = {row["row"]: row for row in rows_of(tmp_path / "out.jsonl")}
    assert second[1] == first[1]
    assert echoed(second[0]) == "new A test.What is this?"


def test_openai_batch_lines_are_answered_by_themselves(batchmill: Run, tmp_path: Path) -> None:
    chat = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hi there"}]}
    write(
        tmp_path / "in.jsonl",
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "b", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}},
        {
            "custom_id": "c",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": "One two three", "max_tokens": 2},
        },
    )
    done = batchmill("run", "in.jsonl", "-o", "out.jsonl")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out.jsonl")
    assert [(row["id"], echoed(row)) for row in rows] == [
        ("a", "Hi there"),
        ("b", ""),
        ("c", "One two"),
    ]
    assert rows[0]["body"] == chat
    assert "line 2: 'url' is '/v1/embeddings'" in rows[1]["error"]
    assert "OpenAI batch lines" in done.stderr
    assert "--output-format openai writes OpenAI's output" in done.stderr
    assert done.stderr.count("this run's model answers them") == 1


def test_some_rows_are_asked_for_and_the_rest_later(batchmill: Run, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", *[{"prompt": f"p{i}"} for i in range(50)])
    line = ["run", "in.jsonl", "-o", "out.jsonl"]
    done = batchmill(*line, "--sample", "20%", "--shuffle", "--limit", "5", "--seed", "3")
    assert done.returncode == 0, done.stderr
    first = rows_of(tmp_path / "out.jsonl")
    assert len(first) == 5
    done = batchmill(*line, "--sample", "20", "--seed", "3")
    assert done.returncode == 0, done.stderr
    second = rows_of(tmp_path / "out.jsonl")
    assert len(second) == 20
    assert [row for row in second if row in first] == first
    assert all(echoed(row) == f"p{row['row']}" for row in second)


def test_submit_takes_the_same_options(
    batchmill: Run, tmp_path: Path, server: Any, connection: redis.Redis
) -> None:
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    write(tmp_path / "in.jsonl", {"key": 7, "talk": talk, "note": 1}, {"key": 8, "talk": []})
    done = batchmill(
        *("submit", "in.jsonl", "--run", "r", "--messages-column", "talk", "--id-column", "key"),
        *("--rename", "note=remark", "--redis-url", server.url),
    )
    assert done.returncode == 0, done.stderr
    assert "messages from column 'talk'" in done.stderr
    assert "asked without it" in done.stderr
    Answerer(connection).answer()
    done = batchmill("results", "r", "-o", "out.jsonl", "--redis-url", server.url)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out.jsonl")
    assert [(row["id"], row["key"], row["error_code"]) for row in rows] == [
        (7, 7, ""),
        (8, 8, "invalid_request"),
    ]
    assert rows[0]["remark"] == 1
    assert "talk" not in rows[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--prompt-column", "qestion"], "no column 'qestion', named for the prompt (did you mean"),
        (
            ["--prompt-column", "a", "--template", "b"],
            "give a prompt column or a template, not both",
        ),
        (["--template", "{{ question"], "the template can't be used: line 1"),
        (["--template", "{{ qestion }}"], "no column 'qestion', named for a template"),
        (["--template", "@none.jinja"], "--template: can't read none.jinja: No such file"),
        (["--system", "@latin"], "--system: latin isn't text in UTF-8"),
        (["--prompt-column", "question", "--rename", "a"], "--rename 'a': write old=new"),
        (["--prompt-column", "question", "--rename", "key=text"], "'text' is a column of every"),
        (["--prompt-column", "question", "--select", "answer,nothing"], "no column 'nothing'"),
        (["--prompt-column", "question", "--drop", "id"], "it can't be dropped"),
        (["--sample", "x"], "--sample 'x': give a number of rows or a percentage"),
        (["--sample", "0%", "--shuffle"], "the sample is 0%"),
        ([], "if that is the prompt: --prompt-column question"),
    ],
)
def test_what_cannot_be_is_told_in_a_line_before_anything_starts(
    batchmill: Run, tmp_path: Path, options: list[str], told: str
) -> None:
    write(tmp_path / "in.jsonl", *ROWS)
    (tmp_path / "latin").write_bytes(b"\xe9")
    is_of_submit = (
        len(options) == 2 and options[0] != "--sample"
    )  # both have the same, so that half of them each will do
    line = ["submit", "in.jsonl"] if is_of_submit else ["run", "in.jsonl", "-o", "out.jsonl"]
    done = batchmill(*line, *options, REDIS_URL="unix:///none")
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "unix:///none" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_dry_run_shows_what_the_model_would_get_and_starts_nothing(
    batchmill: Run, tmp_path: Path
) -> None:
    questions = [f"What is {i} + {i}?" if i % 10 else "" for i in range(1, 41)]
    write(tmp_path / "in.jsonl", *[{"question": question} for question in questions])
    done = batchmill(
        *("run", "in.jsonl", "-o", "out.jsonl", "--model", "demo", "--dry-run"),
        *("--prompt-column", "question", "--system", "Be brief.", "--max-tokens", "5"),
        REDIS_URL="unix:///none",
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out.jsonl").exists()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_PATH)
    tokens = []
    for question in filter(None, questions):
        chat = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": question},
        ]
        tokens.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
    lines = done.stdout.splitlines()
    assert lines[0] == "prompt from column 'question'"
    assert lines[2] == f"row 0, id '0', {len(tokens[0])} tokens, at most 5 new ones:"
    shown = [line.removeprefix("  | ") for line in lines if line.startswith("  | ")]
    assert "\n".join(shown) == "\n".join(map(tokenizer.decode, tokens[:3]))
    assert "rows: 40, 40 of them looked at" in lines
    told = "4 of those are wrong, the first: line 10: column 'question' is empty"
    assert any(line.startswith(told) for line in lines)
    total = sum(map(len, tokens))
    assert lines[-1].startswith(f"in all about {total:,} tokens of prompts, and at most about 180 ")


def test_turns_are_asked_one_after_the_other(batchmill: Run, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", {"turns": ["One", "two"]}, {"turns": ["Single"]})
    line = ["run", "in.jsonl", "-o", "out.jsonl", "--turns-column", "turns", "--max-tokens"]
    done = batchmill(*line, "2")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out.jsonl")
    # the engine says the first words of all that it is given
    assert [row["turn_texts"] for row in rows] == [["One One", "One One"], ["Single Single"]]
    assert rows[0]["usage"]["prompt_tokens"] == 4
    assert not [*tmp_path.glob(".out.jsonl.turn*")]
    done = batchmill("submit", "in.jsonl", "--turns-column", "turns", REDIS_URL="unix:///none")
    assert done.returncode == 2
    assert "submit asks each row once" in done.stderr


def test_a_line_break_that_is_none_is_told_of(batchmill: Run, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", *ROWS)
    done = batchmill("run", "in.jsonl", "-o", "o", "--template", r"{{ question }}\nA:", "--dry-run")
    assert "--template has a backslash and an n, which stay such" in done.stderr
    assert r"  | What is this?\nA:" in done.stdout


def test_a_dry_run_needs_neither_a_model_nor_all_of_a_pipe(batchmill: Run, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", *ROWS * 1000)
    options = ["-o", "out.jsonl", "--template", "Q: {{ question }}", "--dry-run"]
    done = batchmill("run", "in.jsonl", *options, "--shuffle", "--limit", "700")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  | Q: ") == 3
    assert "rows: 700, 700 of them looked at\ntokens aren't counted" in done.stdout
    line = shlex.join([*BATCHMILL, "run", "-", *options])
    # the pipe stays open until the command has ended
    done = subprocess.run(
        ["bash", "-c", f"mkfifo gate; (cat in.jsonl; cat gate) | ({line}; echo > gate)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "BATCHMILL_MODEL": "echo:tokens=5"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stdout.count("  | Q: ") == 3, done.stderr
    assert "rows: unknown, " in done.stdout
