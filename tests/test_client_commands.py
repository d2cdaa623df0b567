"""submit, results, status and cancel, as a user types them."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from kits.client_kit import Answerer, rq_queue
from kits.worker_kit import until

from queue_api.connection.embedded import EmbeddedRedis

ROOT = Path(__file__).parent.parent
COMMAND = [
    sys.executable,
    "-c",
    "from batchmill.__main__ import main; main()",
]


@pytest.fixture
def environment(server: EmbeddedRedis, connection: redis.Redis) -> dict[str, str]:
    return {
        **os.environ,
        "BATCHMILL_REDIS_URL": server.url,
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "100",
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [{"id": i, "prompt": f"p{i}", "note": f"n{i}"} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return path


def batchmill(
    *arguments: object, environment: dict[str, str], stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_run_in_pieces(
    environment: dict[str, str], source: Path, answerer: Answerer, connection: redis.Redis
) -> None:
    submitted = batchmill("submit", source, "--max-tokens", 7, environment=environment)
    assert submitted.returncode == 0, submitted.stderr
    run = submitted.stdout.strip()
    again = batchmill("submit", source, "--max-tokens", 7, environment=environment)
    assert again.stdout.strip() == run
    assert len(rq_queue(connection)) == 1
    requests = rq_queue(connection).jobs[0].kwargs["requests"]
    assert {request["sampling"]["max_tokens"] for _, request in requests} == {7}

    early = batchmill("results", run, "--no-follow", environment=environment)
    assert early.returncode == 3
    assert [json.loads(line)["row"] for line in early.stdout.splitlines()] == [5]
    assert "1 of 6 requests are done" in early.stderr

    answerer.answer()
    output = source.with_name("out.jsonl")
    for _ in range(2):  # the second time there is nothing to add
        assert batchmill("results", run, "-o", output, environment=environment).returncode == 0
        rows = {row["id"]: row for row in map(json.loads, output.read_text().splitlines())}
        assert len(output.read_text().splitlines()) == 6
    assert rows.keys() == {*range(5), None}  # of one type
    assert [rows[i]["text"] for i in range(5)] == [f"answer to p{i}" for i in range(5)]
    assert [rows[i]["note"] for i in range(5)] == [f"n{i}" for i in range(5)]
    assert "line 6: not JSON" in rows[None]["error"]

    status = batchmill("status", run, "--json", environment=environment)
    told = json.loads(status.stdout)
    assert (told["complete"], told["done"], told["total"]) == (True, 6, 6)
    assert told["finish_reasons"] == {"stop": 5, "error": 1}
    table = batchmill("status", run, environment=environment).stdout
    assert "complete" in table
    assert "6 of 6" in table


@pytest.mark.parametrize("command", ["submit", "run"])
def test_options_about_lengths_and_the_models_defaults_reach_every_request(
    environment: dict[str, str],
    source: Path,
    answerer: Answerer,
    connection: redis.Redis,
    command: str,
) -> None:
    own = ["-o", source.with_name("out.jsonl"), "--workers", 0] if command == "run" else []
    options = ["--truncate-max-tokens", "--generation-defaults", "none", "--queue", "batchmill"]
    process = subprocess.Popen(
        [*COMMAND, command, str(source), *map(str, own), *options],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    until(lambda: len(rq_queue(connection)) == 1)
    requests = rq_queue(connection).jobs[0].kwargs["requests"]
    sent = {json.dumps(request["sampling"], sort_keys=True) for _, request in requests}
    assert sent == {'{"generation_defaults": "none", "truncate_max_tokens": true}'}
    answerer.answer()
    assert process.wait(timeout=60) == 0


def test_cancelled_by_command(
    environment: dict[str, str], source: Path, connection: redis.Redis
) -> None:
    batchmill("submit", source, "--run", "r", environment=environment)
    one = batchmill("cancel", "r", "--request", "3", environment=environment)
    assert "cancelled 1 requests" in one.stderr
    rest = batchmill("cancel", "r", environment=environment)
    assert "cancelled 4 requests" in rest.stderr
    assert len(rq_queue(connection)) == 0
    results = batchmill("results", "r", environment=environment)
    assert results.returncode == 0
    rows = [json.loads(line) for line in results.stdout.splitlines()]
    assert [row["finish_reason"] for row in rows] == ["error", *["cancelled"] * 5]
    assert [row["id"] for row in rows] == [None, 3, 0, 1, 2, 4]


def test_stdin_to_stdout(environment: dict[str, str], answerer: Answerer) -> None:
    submitted = batchmill(
        "submit", "-", "--run", "r", environment=environment, stdin='{"prompt": "hé"}\n'
    )
    assert submitted.stdout == "r\n"
    answerer.answer()
    results = batchmill("results", "r", environment=environment)
    assert json.loads(results.stdout)["text"] == "answer to hé"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "nope"], "no run 'nope' in this Redis"),
        (["results", "nope"], "no run 'nope' in this Redis"),
        (["cancel", "nope"], "no run 'nope' in this Redis"),
        (["status", "no spaces"], "run id 'no spaces': use 1 to 128 letters"),
        (["submit", "none.jsonl"], "can't read none.jsonl: No such file or directory"),
        (["submit", "IN", "--max-tokens", "0"], "'max_tokens' is 0: must be at least 1"),
        (["submit", "IN", "--generation-defaults", "some"], "'generation_defaults' is 'some'"),
        (["submit", "IN", "--chunk-size", "0"], "--chunk-size"),
        (["submit", "IN", "--bogus"], "No such option: --bogus"),
        (["bogus"], "No such command 'bogus'"),
        (["status", "r", "--redis-url", "http://x"], "'http://x' isn't a Redis URL"),
        (["status", "r", "--redis-url", "unix:///none"], "no Redis answers at unix:///none"),
        (["status", "r", "--redis-url", "unix://:pass@/none"], "unix://:***@/none"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_and_exit_code_2(
    environment: dict[str, str], source: Path, arguments: list[str], message: str
) -> None:
    arguments = [str(source) if argument == "IN" else argument for argument in arguments]
    told = batchmill(*arguments, environment=environment)
    assert told.returncode == 2
    assert message in told.stderr
    assert "Traceback" not in told.stderr
    assert "pass@" not in told.stderr
    assert told.stdout == ""


def test_a_wrong_setting_names_its_variable(environment: dict[str, str]) -> None:
    told = batchmill("status", "r", environment={**environment, "BATCHMILL_CHUNK_SIZE": "many"})
    assert told.returncode == 2
    assert "BATCHMILL_CHUNK_SIZE is 'many'" in told.stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_wait_at_once(
    environment: dict[str, str], source: Path, signum: signal.Signals, code: int
) -> None:
    batchmill("submit", source, "--run", "r", environment=environment)
    output = source.with_name("out.jsonl")
    waiting = subprocess.Popen(
        [*COMMAND, "results", "r", "-o", str(output)],
        env=environment,
        stderr=subprocess.PIPE,
        # As a terminal has it: a shell that runs the tests in the background ignores Ctrl-C.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    until(lambda: output.exists() and output.stat().st_size)  # the broken row is there
    waiting.send_signal(signum)
    _, told = waiting.communicate(timeout=20)
    assert (waiting.returncode, told) == (code, b"")


def test_a_reader_that_goes_away_ends_it_quietly(
    environment: dict[str, str], source: Path, tmp_path: Path, answerer: Answerer
) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text('{"prompt": "x"}\n' * 2000)
    batchmill("submit", many, "--run", "r", environment=environment)
    answerer.answer()
    writing = subprocess.Popen(
        [*COMMAND, "results", "r"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert writing.stdout is not None
    assert writing.stdout.readline()
    writing.stdout.close()
    _, told = writing.communicate(timeout=20)
    assert (writing.returncode, told) == (141, b"")
