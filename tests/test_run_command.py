"""`batchmill run` as a user runs it: real processes, a real Redis, real signals."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kits.worker_kit import PATIENCE_S, until, workers
from rq import Queue

from engine.demo_model import DEMO_MODEL_PATH
from queue_api.connection.embedded import EmbeddedRedis

ROOT = Path(__file__).parent.parent
SLOW_ECHO = "echo:tokens=20,step_s=0.02,max_num_seqs=32"
"""Some seconds for 2,000 rows: time enough to interfere."""


class Command:
    """`batchmill …` in a process of its own."""

    def __init__(self, *arguments: object, cwd: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "batchmill", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            # As a terminal has it: a shell that runs the tests in the background ignores Ctrl-C.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )

    def end(self) -> tuple[int, str, str]:
        """Its exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=3 * PATIENCE_S)
        return self.process.returncode, out, err


@pytest.fixture
def batchmill(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(*arguments: object, **environment: str) -> Command:
        command = Command(*arguments, cwd=tmp_path, **environment)
        started.append(command)
        return command

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(f'{{"id": {i}, "prompt": "row {i} of many"}}\n' for i in range(count)))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def some_lines(path: Path, count: int = 100) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= count


def test_run_answers_every_row_and_leaves_nothing_running(batchmill, tmp_path):
    rows = [
        {"id": "sum", "prompt": "What is 2 + 3?", "max_tokens": 8, "note": [1, {"a": None}]},
        {"id": 7, "messages": [{"role": "user", "content": "What is 2 + 3?"}]},
        {"prompt": ""},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "max_tokens": 1_000_000},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + "{not json}\n"
    (tmp_path / "in.jsonl").write_text(text)
    command = batchmill(
        "run", "in.jsonl", "-o", "out.jsonl", "--stages", "cpu,cpu", "--model", "demo"
    )
    code, out, err = command.end()
    assert code == 0, err
    assert out == ""
    written = {row["row"]: row for row in read_rows(tmp_path / "out.jsonl")}
    assert sorted(written) == [0, 1, 2, 3, 4, 5]
    assert written[0]["note"] == [1, {"a": None}]
    assert written[1]["id"] == 7
    assert len(written[0]["timings"]["stage_s"]) == 2
    assert [written[i]["finish_reason"] == "error" for i in range(6)] == [False] * 2 + [True] * 4
    assert written[4]["error_code"] == "max_tokens_too_large"
    assert "'prompt'" in written[2]["error"]
    assert "'max_tokens' is 0" in written[3]["error"]
    assert written[5]["error"].startswith("line 6")
    with pytest.raises(ProcessLookupError):
        os.kill(int(written[0]["worker"].split("-")[-2]), 0)


def test_data_go_through_pipes(batchmill):
    command = batchmill("run", "-", "-o", "-", "--model", "echo:tokens=3")
    out, err = command.process.communicate('{"prompt": "a b c"}\n', timeout=PATIENCE_S)
    assert command.process.returncode == 0, err
    assert json.loads(out)["text"] == "a b c"


@pytest.mark.parametrize("options", [(), ("--group-prefixes",)], ids=str)
def test_killing_one_of_two_workers_loses_and_doubles_nothing(
    batchmill, connection, server, tmp_path, options
):
    write_rows(tmp_path / "in.jsonl", 2000)
    command = batchmill(
        "run", "in.jsonl", "-o", "out.jsonl", "--workers", "2", "--model", SLOW_ECHO,
        "--redis-url", server.url, *options,
        BATCHMILL_LEASE_S="2",
    )  # fmt: skip
    until(lambda: some_lines(tmp_path / "out.jsonl"))
    victim = workers(connection)[0]
    os.kill(victim.pid, signal.SIGKILL)
    code, _, err = command.end()
    assert code == 0, err
    rows = read_rows(tmp_path / "out.jsonl")
    assert sorted(row["id"] for row in rows) == list(range(2000))
    assert {row["finish_reason"] for row in rows} == {"length"}
    assert any(row["attempt"] > 1 for row in rows), "the victim held work that others took over"


def test_redis_killed_and_restarted_midway_loses_and_doubles_nothing(batchmill, tmp_path):
    write_rows(tmp_path / "in.jsonl", 2000)
    with EmbeddedRedis() as own:
        command = batchmill(
            "run", "in.jsonl", "-o", "out.jsonl", "--workers", "2", "--model", SLOW_ECHO,
            "--redis-url", own.url,
            BATCHMILL_LEASE_S="2",
        )  # fmt: skip
        until(lambda: some_lines(tmp_path / "out.jsonl"))
        own.restart(kill=True)
        code, _, err = command.end()
    assert code == 0, err
    ids = sorted(row["id"] for row in read_rows(tmp_path / "out.jsonl"))
    assert ids == list(range(2000))


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_broken_off_goes_on_when_started_again(batchmill, tmp_path, signum, exit_code):
    write_rows(tmp_path / "in.jsonl", 1000)
    arguments = ("run", "in.jsonl", "-o", "out.jsonl", "--model")
    first = batchmill(*arguments, SLOW_ECHO)
    until(lambda: some_lines(tmp_path / "out.jsonl"))
    first.process.send_signal(signum)
    code, _, err = first.end()
    assert code == exit_code, err
    assert "same command" in err
    before = len(read_rows(tmp_path / "out.jsonl"))
    assert 0 < before < 1000
    code, _, err = batchmill(*arguments, "echo:tokens=20").end()
    assert code == 0, err
    assert sorted(row["id"] for row in read_rows(tmp_path / "out.jsonl")) == list(range(1000))
    assert f"{1000 - before:,}" in err


def test_a_run_killed_outright_takes_its_workers_with_it(batchmill, connection, server, tmp_path):
    write_rows(tmp_path / "in.jsonl", 1000)
    command = batchmill(
        "run", "in.jsonl", "-o", "out.jsonl", "--model", SLOW_ECHO, "--redis-url", server.url,
        BATCHMILL_DRAIN_GRACE_S="1",
    )  # fmt: skip
    until(lambda: some_lines(tmp_path / "out.jsonl"))
    (worker,) = workers(connection)
    command.process.kill()
    until(lambda: not workers(connection))
    with pytest.raises(ProcessLookupError):
        until(lambda: os.kill(worker.pid, 0))


def test_workers_that_cannot_start_end_the_run_and_leave_no_trace(
    batchmill, connection, server, tmp_path
):
    write_rows(tmp_path / "in.jsonl", 1)
    (tmp_path / "empty").mkdir()
    code, _, err = batchmill(
        "run", "in.jsonl", "-o", "out.jsonl", "--model", "./empty", "--workers", "2",
        "--redis-url", server.url,
    ).end()  # fmt: skip
    assert code == 2
    assert err.count("empty") == 1, "said once, however many workers say it"
    assert "Traceback" not in err
    assert connection.keys("*") == []
    assert not (tmp_path / "out.jsonl").exists()


def test_a_finished_run_takes_its_queue_with_it(batchmill, connection, server, tmp_path):
    write_rows(tmp_path / "in.jsonl", 40)
    arguments = ("run", "in.jsonl", "-o", "out.jsonl", "--model", "echo:")
    code, _, err = batchmill(*arguments, "--redis-url", server.url).end()
    assert code == 0, err
    assert Queue.all(connection=connection) == []
    forever = [key for key in connection.keys("*") if connection.ttl(key) == -1]
    assert forever == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.jsonl", "-o", "out.jsonl"), "nowhere.jsonl"),
        (("in.jsonl", "-o", "no/such/folder/out.jsonl"), "no/such/folder"),
        (("in.jsonl", "-o", "in.jsonl"), "both input and output"),
        (("in.jsonl", "-o", "out.jsonl", "--model", "./nowhere"), "./nowhere"),
        (("in.jsonl", "-o", "out.jsonl", "--stages", "abacus"), "abacus"),
        (("in.jsonl", "-o", "out.jsonl", "--max-tokens", "0"), "max_tokens"),
        (("in.jsonl", "-o", "out.jsonl", "--redis-url", "redis://127.0.0.1:1/0"), "127.0.0.1:1"),
        (("in.jsonl", "-o", "out.jsonl", "--workers", "0"), "--queue"),
    ],
)
def test_what_is_wrong_is_said_in_one_place_and_exits_2(batchmill, tmp_path, arguments, words):
    write_rows(tmp_path / "in.jsonl", 1)
    code, out, err = batchmill("run", *arguments).end()
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())
    assert "Traceback" not in err


def test_settings_of_the_workers_are_read_before_anything_starts(batchmill, tmp_path):
    write_rows(tmp_path / "in.jsonl", 1)
    command = batchmill("run", "in.jsonl", "-o", "out.jsonl", BATCHMILL_NUM_THREADS="many")
    code, _, err = command.end()
    assert code == 2
    assert err.count("BATCHMILL_NUM_THREADS is 'many'") == 1


def test_settings_that_contradict_each_other_are_told_before_anything_starts(batchmill, tmp_path):
    write_rows(tmp_path / "in.jsonl", 1)
    flags = ["--quantization", "int8", "--dtype", "bfloat16"]
    code, _, err = batchmill("run", "in.jsonl", "-o", "out.jsonl", *flags).end()
    assert code == 2
    assert err.count("is for float32 on a CPU") == 1


def test_wrong_password_is_told_and_not_shown(batchmill, connection, server, tmp_path):
    write_rows(tmp_path / "in.jsonl", 1)
    connection.acl_setuser("anna", enabled=True, passwords=["+right"], categories=["+@all"])
    url = server.url.replace("unix://", "unix://anna:wr0ngsecret@")
    code, _, err = batchmill("run", "in.jsonl", "-o", "out.jsonl", "--redis-url", url).end()
    assert code == 2
    assert "password" in err
    assert "wr0ngsecret" not in err


def test_grouped_prompts_say_what_they_say_in_the_file_s_order(batchmill, tmp_path):
    shots = [f"Q: What is {n} + 1?\nA: {n + 1}\n\n" * 12 for n in (3, 5, 7)]
    rows = [
        {"prompt": f"{shots[i % 3]}Q: What is {i} + 1?\nA:", "max_tokens": 4 + i % 7}
        | ({"temperature": 0.9, "seed": i} if i % 2 else {})
        for i in range(120)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = []
    for name, options in (("plain", ()), ("grouped", ("--group-prefixes", "--chunk-size", 8))):
        command = batchmill("run", "in.jsonl", "-o", name, "--workers", "2", *options)
        code, _, err = command.end()
        assert code == 0, err
        written = sorted(read_rows(tmp_path / name), key=lambda row: row["row"])
        texts.append([(row["row"], row["text"], row["finish_reason"]) for row in written])
    assert [row for row, _, _ in texts[0]] == list(range(120))
    assert texts[1] == texts[0]


def test_demo_model_is_named_as_such(batchmill, tmp_path):
    assert DEMO_MODEL_PATH.is_dir()
    (tmp_path / "in.jsonl").write_text('{"prompt": "What is 1 + 1?"}\n')
    code, _, err = batchmill("run", "in.jsonl", "-o", "out.jsonl").end()
    assert code == 0, err
    assert "demo" in read_rows(tmp_path / "out.jsonl")[0]["model"]


def test_samples_come_back_in_their_row(batchmill, tmp_path):
    rows = [{"prompt": "one", "n": 3, "temperature": 1.5, "seed": 4}, {"prompt": "two", "n": 2}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", DEMO_MODEL_PATH, "--max-tokens", 8]
    _, _, errors = batchmill("run", "in.jsonl", "-o", "out.jsonl", *options).end()
    sampled, greedy = sorted(read_rows(tmp_path / "out.jsonl"), key=lambda row: row["row"])
    assert sampled["error"] == "", errors
    outputs = sampled["outputs"]
    assert [output["index"] for output in outputs] == [0, 1, 2]
    assert outputs[0]["text"] == sampled["text"]
    assert len({output["text"] for output in outputs}) == 3
    assert "'n' is 2" in greedy["error"]
    assert "outputs" not in greedy


def test_given_forms_and_prompt_logprobs_come_back_in_their_rows(batchmill, tmp_path):
    pytest.importorskip("xgrammar", reason="needs the extra 'structured'")
    rows = [
        {"prompt": "one", "structured_outputs": {"regex": "[ab]{4}"}},
        {"prompt": "two", "structured_outputs": {"choice": ["yes and no"]}, "max_tokens": 1},
        {"prompt": "three", "structured_outputs": {"regex": "((("}},
        {"prompt": "four", "structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"prompt": "five", "prompt_logprobs": 1},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", DEMO_MODEL_PATH, "--max-tokens", 8]
    _, _, errors = batchmill("run", "in.jsonl", "-o", "out.jsonl", *options).end()
    done = sorted(read_rows(tmp_path / "out.jsonl"), key=lambda row: row["row"])
    assert done[0]["error"] == "", errors
    assert re.fullmatch("[ab]{4}", done[0]["text"])
    judged = [row.get("structured_output") for row in done]
    assert judged == ["valid", "truncated", None, None, None]
    assert "parenthesis" in done[2]["error"]
    assert "exactly one" in done[3]["error"]
    assert done[4]["error"] == ""
    first, *others = done[4]["prompt_logprobs"]
    assert first is None
    assert len(others) + 1 == done[4]["usage"]["prompt_tokens"]
    assert all(token["logprob"] <= 0 and len(token["top"]) == 1 for token in others)


def crashing(rows: int, at: set[int]) -> str:
    texts = ["poison" if i in at else f"word{i}" for i in range(rows)]
    return "".join(json.dumps({"prompt": text}) + "\n" for text in texts)


CRASHING = ("--model", "echo:tokens=2,marked=poison,on_marked=abort")


@pytest.mark.parametrize(
    ("rows", "at"), [(60, {7, 41}), (2, {0, 1})], ids=["among others", "alone"]
)
def test_two_rows_that_crash_workers_cost_a_run_nothing_else(batchmill, tmp_path, rows, at):
    (tmp_path / "in.jsonl").write_text(crashing(rows, at))
    run = batchmill("run", "in.jsonl", "-o", "out.jsonl", *CRASHING, BATCHMILL_LEASE_S="1")
    code, _, err = run.end()
    assert code == (0 if len(at) < rows else 4), err
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(found) == rows
    codes = {int(row["id"]): row["error_code"] for row in found}
    assert codes == {i: "quarantined" if i in at else "" for i in range(rows)}


def test_workers_that_crash_at_everything_end_the_run(batchmill, tmp_path):
    (tmp_path / "in.jsonl").write_text(crashing(40, set(range(40))))
    run = batchmill("run", "in.jsonl", "-o", "out.jsonl", *CRASHING, BATCHMILL_LEASE_S="1")
    code, _, err = run.end()
    assert code not in (0, 2)
    assert "starting them again brought no text" in err
