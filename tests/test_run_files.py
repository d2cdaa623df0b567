"""`batchmill run` and `results` over odd files: told in a line, before anything is started."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from kits.client_kit import Answerer

from queue_api.connection.embedded import EmbeddedRedis
from queue_api.store.keys import RunKeys
from queue_api.store.runs import emit_args
from queue_api.store.scripts import load_script
from queue_api.wire.plain_text import PlainTextFormatter
from queue_api.wire.schemas import FinishReason, GenerationResult

ROOT = Path(__file__).parent.parent
BATCHMILL = f"{sys.executable} -m batchmill"
PATIENCE_S = 120

Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Runs a line of bash in the test's folder; `$RUN` is `batchmill run` with an echo."""

    def run(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "COLUMNS": "300",
                "RUN": f"{BATCHMILL} run --model echo:tokens=2",
                "BATCHMILL": BATCHMILL,
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    return run


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: int(row["row"]))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("$RUN in.jsonl -o loop", "can't write loop: Too many levels of symbolic links"),
        ("$RUN in.jsonl -o no/out.jsonl", "can't write no/out.jsonl: No such file or directory"),
        ("$RUN in.jsonl -o in.jsonl/out", "can't write in.jsonl/out: Not a directory"),
        ("$RUN in.jsonl -o .", "can't write .: Is a directory"),
        ("$RUN in.jsonl -o /dev/full", "can't write /dev/full: No space left on device"),
        ("$RUN in.jsonl -o hard", "in.jsonl can't be both input and output"),
        ("$RUN in.jsonl -o soft", "in.jsonl can't be both input and output"),
        ("$RUN - -o in.jsonl < in.jsonl", "- can't be both input and output"),
        ("$RUN in.jsonl -o - >> in.jsonl", "in.jsonl can't be both input and output"),
        ("$RUN - -o - < in.jsonl >> in.jsonl", "- can't be both input and output"),
        ("$RUN in.jsonl -o - >&-", "can't write to the standard output: it is closed"),
        ("$RUN - -o out.jsonl <&-", "can't read the standard input: it is closed"),
        ("$RUN in.jsonl -o - > /dev/full", "can't write -: No space left on device"),
        ("$BATCHMILL --version > /dev/full", "can't write: No space left on device"),
        ("$RUN . -o out.jsonl", "the folder . has files of several formats: '.csv', '.jsonl'"),
        ("$RUN none -o out.jsonl", "can't read none: No such file or directory"),
        ("$RUN in.jsonl -o notes", "line 1 of notes isn't a row that batchmill wrote"),
        (
            "$RUN table.csv -o out.jsonl",
            "Its columns are 'n', 'question'; if that is the prompt: --prompt-column",
        ),
        ("gzip < in.jsonl | head -c 20 | $RUN - -o out.jsonl", "- is gzip that was cut off"),
        (
            "python3 -m zipfile -c in.zip in.jsonl; $RUN in.zip -o out.jsonl",
            "in.zip is a zip archive",
        ),
        ("$RUN wrong.jsonl -o out.jsonl", "if that is the prompt: --prompt-column question"),
        ("$RUN in.jsonl -o out.jsonl --fields temprature", "'temprature' isn't a field"),
        (
            "$RUN in.jsonl -o out.jsonl --stop $'\\xff'",
            "'stop[0]' is '\\udcff': holds half a surrogate pair",
        ),
        ("$BATCHMILL submit wrong.jsonl --redis-url unix:///none", "Its columns are 'question'"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_before_anything_starts(
    shell: Shell, tmp_path: Path, line: str, told: str
) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    write(tmp_path / "wrong.jsonl", {"question": "a"}, {"question": "b"})
    write(tmp_path / "table.csv", "question,n", "a,1")
    write(tmp_path / "notes", "mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "soft").symlink_to("in.jsonl")
    (tmp_path / "hard").hardlink_to(source)
    before = source.read_bytes()
    # a Redis that can't be had would be told of if it were asked for first
    done = shell(line, REDIS_URL="unix:///none")
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert "unix:///none" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert source.read_bytes() == before
    assert (tmp_path / "notes").read_text() == "mine\n"
    output = tmp_path / "out.jsonl"
    assert not output.exists() or output.read_text() == ""


def test_pipes_are_inputs_and_outputs(shell: Shell, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    done = shell("$RUN <(cat in.jsonl) -o sub.jsonl && cat in.jsonl | $RUN - -o - > std.jsonl")
    assert done.returncode == 0, done.stderr
    os.mkfifo(tmp_path / "fifo")
    done = shell("(cat in.jsonl > fifo) & $RUN fifo -o fifo.jsonl")
    assert done.returncode == 0, done.stderr
    os.mkfifo(tmp_path / "drain")
    done = shell("cat drain > out.jsonl & $RUN in.jsonl -o drain && wait")
    assert done.returncode == 0, done.stderr
    for name in ("sub", "std", "fifo", "out"):
        rows = rows_of(tmp_path / f"{name}.jsonl")
        assert [row["text"] for row in rows] == ["a a", "b b"], name
    assert len(source.read_text().splitlines()) == 2


def test_several_files_of_any_format_are_one_input(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/b.jsonl", {"prompt": "b"})
    (tmp_path / "data/a.csv").write_text("prompt\na\n")
    (tmp_path / "c.lst").write_text("c\nd\n")
    for _ in range(2):  # the second time, the pattern matches the output, too
        done = shell("$RUN 'data/*' data/../data/a.csv -o data/out.jsonl")
        assert done.returncode == 0, done.stderr
    assert [row["text"] for row in rows_of(tmp_path / "data/out.jsonl")] == ["a a", "b b", "a a"]
    done = shell("$RUN c.lst -o out.jsonl --format txt")
    assert done.returncode == 0, done.stderr
    assert [row["prompt"] for row in rows_of(tmp_path / "out.jsonl")] == ["c", "d"]
    done = shell("$BATCHMILL submit c.lst --format xml")
    assert done.returncode == 2
    assert "no format 'xml': there are jsonl, json, csv, tsv, parquet, arrow, txt" in done.stderr


def test_no_file_takes_the_place_of_a_closed_stream(shell: Shell, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    done = shell("$RUN in.jsonl -o out.jsonl <&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [row["text"] for row in rows_of(tmp_path / "out.jsonl")] == ["a a", "b b"]


def test_the_exit_code_tells_of_rows_with_errors(shell: Shell, tmp_path: Path) -> None:
    good, wrong = {"prompt": "a"}, {"prompt": "b", "max_tokens": 0}
    write(tmp_path / "half.jsonl", good, wrong)
    done = shell("$RUN half.jsonl -o 1; echo $?; $RUN half.jsonl -o 2 --fail-on-error; echo $?")
    assert done.stdout.split() == ["0", "4"]
    assert "1 of 2 rows have errors, more than 0 of them" in done.stderr
    done = shell("$RUN half.jsonl -o 1 --max-errors 50%; echo $?")
    assert done.stdout.split() == ["0"]
    assert "1 rows that were written before have errors and stand; --retry-errors" in done.stderr
    done = shell("$RUN half.jsonl -o 1 --max-errors 40%; echo $?")
    assert done.stdout.split() == ["4"]
    # a row that a worker refuses is readable, so that this shows at the end alone
    write(tmp_path / "late.jsonl", {"prompt": "a", "deadline": 1.0})
    done = shell("$RUN late.jsonl -o 3; echo $?; $RUN late.jsonl -o 3; echo $?")
    assert done.stdout.split() == ["4", "4"]
    assert "all 1 rows have errors; the first: wasn't done by its deadline" in done.stderr
    write(tmp_path / "many.jsonl", *[good] * 9, *[wrong] * 3000)
    done = shell("$RUN many.jsonl -o 4 --max-errors 10% --window 64; echo $?")
    assert done.stdout.split() == ["4"]
    assert "the rest isn't asked for" in done.stderr
    assert len(rows_of(tmp_path / "4")) < 2000


def test_errors_are_asked_for_again_or_put_right_and_the_rest_stands(
    shell: Shell, tmp_path: Path
) -> None:
    write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b", "deadline": 1.0})
    assert shell("$RUN in.jsonl -o out.jsonl").returncode == 0
    first = rows_of(tmp_path / "out.jsonl")
    assert [row["error_code"] for row in first] == ["", "deadline_exceeded"]
    done = shell("$RUN in.jsonl -o out.jsonl --retry-errors")
    again = rows_of(tmp_path / "out.jsonl")
    assert again[0] == first[0]
    assert again[1]["timings"] != first[1]["timings"] or again[1]["worker"] != first[1]["worker"]
    write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    done = shell("$RUN in.jsonl -o out.jsonl")
    assert done.returncode == 0, done.stderr
    assert [row["text"] for row in rows_of(tmp_path / "out.jsonl")] == ["a a", "b b"]
    assert rows_of(tmp_path / "out.jsonl")[0] == first[0]


def test_escape_sequences_reach_no_terminal(shell: Shell, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e"
    write(
        tmp_path / "in.jsonl",
        {"id": f"i{evil}", "prompt": f"p {evil}"},
        {"id": "2", "prompt": "p", f"max_token{evil}": 1, f"max\ntokens{evil}": 1},
        {"id": "3", "prompt": "p", "stop": [], "seed": evil},
        {"id": "4", "messages": "hi"},
        {"id": "5", "messages": ["hi"]},
    )
    done = shell("$RUN in.jsonl -o out.jsonl --show 5")
    assert done.returncode == 0, done.stderr
    told = done.stderr
    for character in "\x1b\x07\x9b\r\u202e":
        assert character not in told, ascii(told)
    assert "\\x1b]0;owned" in told
    assert evil in rows_of(tmp_path / "out.jsonl")[0]["text"] or "p" in told


def test_results_of_another_run_are_not_mixed_in(
    shell: Shell, server: EmbeddedRedis, connection: redis.Redis, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"})
    write(tmp_path / "b.jsonl", {"prompt": "c"}, {"prompt": "d"}, {"prompt": "e"})
    shell(
        "$BATCHMILL submit a.jsonl --run a; $BATCHMILL submit b.jsonl --run b", REDIS_URL=server.url
    )
    Answerer(connection).answer()
    done = shell("$BATCHMILL results a -o out; $BATCHMILL results a -o out", REDIS_URL=server.url)
    assert done.returncode == 0, done.stderr
    before = (tmp_path / "out").read_bytes()
    done = shell("$BATCHMILL results b -o out", REDIS_URL=server.url)
    assert done.returncode == 2
    assert "the output belongs to another run than 'b'" in done.stderr
    assert (tmp_path / "out").read_bytes() == before


def test_a_run_of_errors_alone_is_told_by_results(
    shell: Shell, server: EmbeddedRedis, connection: redis.Redis, tmp_path: Path
) -> None:
    write(tmp_path / "in.jsonl", {"prompt": "a"})
    shell("$BATCHMILL submit in.jsonl --run r", REDIS_URL=server.url)
    failed = GenerationResult(id="0", finish_reason=FinishReason.ERROR)
    connection.register_script(load_script("emit"))(RunKeys.of("r"), emit_args([failed]))
    done = shell("$BATCHMILL results r", REDIS_URL=server.url)
    assert done.returncode == 4
    assert "all 1 requests of run 'r' ended with an error" in done.stderr


@given(st.text())
def test_text_of_strangers_ends_no_line_and_moves_no_cursor(text: str) -> None:
    record = logging.LogRecord("n", logging.INFO, "p", 1, "request %s", (text,), None)
    line = PlainTextFormatter("%(message)s").format(record)
    assert len(line.splitlines()) == 1
    others = line.replace("\t", "")
    assert not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, others))
    turns = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not turns & set(map(unicodedata.bidirectional, others))


def test_a_log_line_cannot_be_forged_and_a_traceback_stays_one() -> None:
    try:
        raise ValueError("wrong \x1b[2J")
    except ValueError as error:
        raised = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("n", logging.INFO, "p", 1, "id %s", ("a\nINFO fine",), raised)
    first, *rest = PlainTextFormatter("%(levelname)s %(message)s").format(record).splitlines()
    assert first == "INFO id a\\nINFO fine"
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "ValueError: wrong \\x1b[2J"


@pytest.mark.parametrize(
    ("output", "options"),
    [
        ("out.jsonl.gz", ""),
        ("out.jsonl.zst", "--ordered"),
        ("out.parquet", "--part-rows 3"),
        ("folder", "--output-format datasets --part-rows 4"),
        ("out.jsonl", "--output-format openai"),
        ("out.jsonl", "--errors wrong.jsonl --errors-only-apart"),
    ],
)
def test_every_output_is_made_continued_and_verified(
    shell: Shell, tmp_path: Path, output: str, options: str
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"p{i}", "n": None} for i in range(8)]
    write(tmp_path / "in.jsonl", *rows, {"prompt": ""})
    line = f"$RUN in.jsonl -o {output} {options} --show 9"
    done = shell(line)
    assert done.returncode == 0, done.stderr
    assert "p0 p0" in done.stderr
    done = shell(f"$BATCHMILL verify {output}")
    assert done.returncode == 0, done.stderr
    assert "9 rows, each as certified" in done.stderr
    write(tmp_path / "in.jsonl", *rows, {"prompt": "put right"}, {"prompt": "p9"})
    done = shell(line)
    assert done.returncode == 0, done.stderr
    done = shell(f"$BATCHMILL verify {output}")
    assert done.returncode == 0, done.stderr
    assert "10 rows, each as certified" in done.stderr
    said = json.loads((tmp_path / f"{output}.certificate.json").read_bytes())
    assert (said["rows_in"], said["rows_out"], said["errors"]) == (10, 10, {})
    assert said["models"][0]["model"].startswith("echo")


def test_an_output_that_changed_since_is_told(shell: Shell, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    done = shell("$BATCHMILL verify out.jsonl")
    assert done.returncode == 2
    assert "no certificate" in done.stderr
    assert shell("$RUN in.jsonl -o out.jsonl").returncode == 0
    content = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl").write_text(content.replace('"text":"a a"', '"text":"b b"'))
    done = shell("$BATCHMILL verify out.jsonl")
    assert (done.returncode, done.stdout) == (3, "row 0 has changed\n")
    done = shell("$RUN in.jsonl -o out.jsonl")
    assert "isn't what out.jsonl.certificate.json says" in done.stderr
    # that it was run again makes it no better
    assert shell("$BATCHMILL verify out.jsonl").returncode == 3


def test_rows_with_errors_are_in_a_file_of_their_own_too(shell: Shell, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", {"prompt": "a", "k": 1}, "", "{broken", {"prompt": "", "k": 2})
    done = shell("$RUN in.jsonl -o out.jsonl --errors wrong.jsonl")
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "out.jsonl")) == 3
    broken, empty = rows_of(tmp_path / "wrong.jsonl")
    assert (broken["row"], broken["line"], broken["raw"]) == (1, 3, "{broken")
    assert (empty["row"], empty["line"], empty["input"]) == (
        2,
        4,
        {"id": "2", "prompt": "", "k": 2},
    )
    assert empty["error_code"] == "invalid_request"
    assert "'prompt' is empty" in empty["error"]
    (tmp_path / "wrong.jsonl").unlink()
    done = shell("$RUN in.jsonl -o out.jsonl --errors wrong.jsonl")
    assert done.returncode == 0, done.stderr
    assert [row["row"] for row in rows_of(tmp_path / "wrong.jsonl")] == [1, 2]
    for wrong in ("in.jsonl", "out.jsonl"):
        done = shell(f"$RUN in.jsonl -o out.jsonl --errors {wrong}")
        assert done.returncode == 2
        assert "can't be both" in done.stderr or "another process" in done.stderr
