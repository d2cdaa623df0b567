"""`batchmill run --report`: what the page and its JSON say is what is in the output."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from kits.worker_kit import PATIENCE_S, until

from batchmill.offline.report_page import page
from batchmill.offline.run_report import Price
from queue_api.datasets.columns import Row
from queue_api.datasets.run_statistics import Origin, RunStatistics
from queue_api.wire.errors import ConfigurationError
from queue_api.wire.schemas import (
    ChatMessage,
    ErrorDetail,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    JobTimings,
)

ROOT = Path(__file__).parent.parent
NUM_ROWS = 300
HOSTILE = (
    "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'><b>&amp;{{ 7*7 }}"
    "<svg/onload=alert(1)>\u202etxet\x00"
)
HALF = HOSTILE + "\ud83d"
"""As names of files may be."""


def write_rows(path: Path, count: int = NUM_ROWS, wrong: int = 0) -> Path:
    rows: list[dict[str, Any]] = [{"id": i, "prompt": f"p{i}"} for i in range(count)]
    for i in range(wrong):
        rows[i] = {"id": i, "prompt": f"p{i}", "max_tokens": 0}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def started(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "batchmill", "run", "in.jsonl", "-o", "out.jsonl"]
    return subprocess.Popen(
        [*command, "--report", "report.html", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,  # noqa: PLW1509
    )


def run(folder: Path, *options: str) -> tuple[int, str]:
    """Exit code and what was said."""
    process = started(folder, *options)
    _, told = process.communicate(timeout=2 * PATIENCE_S)
    return process.returncode, told


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def output_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


class Read(HTMLParser):
    """The page's elements, its texts, and the cells that have a name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.named: dict[str, str] = {}
        self.texts: list[str] = []
        self._name: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)
        self._name = dict(attrs).get("data-name")

    def handle_endtag(self, tag: str) -> None:
        self._name = None

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._name:
            self.named[self._name] = data.strip()


def test_report_says_what_is_in_the_output(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", wrong=4)
    code, told = run(tmp_path, "--model", "echo:tokens=5", "--price", "2,10")
    assert code == 0, told
    found, rows = report_of(tmp_path), output_of(tmp_path)
    assert found["outcome"]["state"] == "complete"
    assert found["rows"]["made"] == found["rows"]["out"] == len(rows) == NUM_ROWS
    assert found["finish_reasons"]["made"] == Counter(row["finish_reason"] for row in rows)
    ((kind, count),) = Counter(row["error_code"] for row in rows if row["error"]).items()
    assert [(each["code"], each["count"]) for each in found["errors"]] == [(kind, count)]
    assert any(row["error"] == found["errors"][0]["message"] for row in rows)
    for name in ("prompt", "completion"):
        tokens = [row["usage"][f"{name}_tokens"] for row in rows if not row["error"]]
        assert found["tokens"]["made"][name] == sum(tokens)
        spread = found["lengths"][name]
        assert (spread["count"], spread["min"], spread["max"]) == (
            len(tokens), min(tokens), max(tokens),
        )  # fmt: skip
    for name in ("queue", "decode", "total"):
        seconds = [row["timings"][f"{name}_s"] for row in rows if not row["error"]]
        assert found["times_s"][name]["max"] == pytest.approx(max(seconds), abs=1e-6)
        assert found["times_s"][name]["sum"] == pytest.approx(sum(seconds), abs=1e-3)
    cost = sum(2 * r["usage"]["prompt_tokens"] + 10 * r["usage"]["completion_tokens"] for r in rows)
    assert found["cost"]["total"] == pytest.approx(cost / 1e6)
    by_row = {row["row"]: row for row in rows}
    assert len(found["samples"]) == 8
    for sample in found["samples"]:
        row = by_row[sample["row"]]
        assert (sample["text"], sample["prompt"]) == (row["text"], row["prompt"])
    html = Read((tmp_path / "report.html").read_text())
    assert html.named["now"] == str(NUM_ROWS)
    assert html.named["errors"] == "4"
    assert html.named["made_completion"] == f"{found['tokens']['made']['completion']:,}"


def test_a_run_that_goes_on_says_what_is_its_own(tmp_path: Path) -> None:
    """And one that was broken off has a report, too."""
    write_rows(tmp_path / "in.jsonl", 2000)
    process = started(tmp_path, "--model", "echo:tokens=20,step_s=0.02,max_num_seqs=32")
    output = tmp_path / "out.jsonl"
    until(lambda: output.exists() and output.read_bytes().count(b"\n") > 100)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, told
    first = report_of(tmp_path)
    before = len(output_of(tmp_path))
    assert first["outcome"]["state"] == "broken off"
    assert first["rows"]["out"] == first["rows"]["made"] == before > 0
    code, told = run(tmp_path, "--model", "echo:tokens=20")
    assert code == 0, told
    second = report_of(tmp_path)["rows"]
    assert (second["before"], second["out"]) == (before, 2000)
    assert second["before"] + second["made"] + second["found"] == 2000
    html = " ".join(" ".join(Read((tmp_path / "report.html").read_text()).texts).split())
    assert f"an output that had {before:,} rows already" in html


def test_rows_of_the_cache_are_no_tokens_of_this_run(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl")
    options = ("--model", "echo:tokens=5", "--cache", "kept", "--price", "2,10")
    assert run(tmp_path, *options)[0] == 0
    first = report_of(tmp_path)
    (tmp_path / "out.jsonl").unlink()
    code, told = run(tmp_path, *options)
    assert code == 0, told
    second = report_of(tmp_path)
    assert (second["rows"]["cached"], second["rows"]["made"]) == (NUM_ROWS, 0)
    assert second["tokens"]["cached"] == first["tokens"]["made"]
    assert (second["tokens_per_s"], second["times_s"]["total"]["count"]) == (0, 0)
    assert (second["cost"]["total"], second["cost"]["saved"]) == (0, first["cost"]["total"])


def test_too_many_errors_have_a_report(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", wrong=100)
    code, told = run(tmp_path, "--model", "echo:tokens=2", "--max-errors", "20")
    assert code == 4, told
    found = report_of(tmp_path)
    assert found["outcome"]["state"] == "too many errors"
    assert "more than 20" in found["outcome"]["message"]
    assert found["rows"]["errors"] > 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--report", "report.txt"], "name a page, such as report.html"),
        (["--report", "nowhere/report.html"], "no folder nowhere"),
        (["--report", "mine.html"], "mine.html, which isn't a report"),
        (["--report", "other.html"], "other.json, which isn't a report"),
        (["--report", "out.html", "-o", "out.json"], "out.json, which isn't a report"),
        (["--price", "cheap"], "the price is 'cheap'"),
        (["--price", "1"], "the price is '1'"),
        (["--price", "1,nan"], "the price is '1,nan'"),
        (["--price=-1,1"], "the price is '-1,1'"),
    ],
)
def test_what_cannot_become_a_report_is_told_before_anything_starts(
    tmp_path: Path, options: list[str], words: str
) -> None:
    write_rows(tmp_path / "in.jsonl", 1)
    for name in ("mine.html", "other.json"):
        (tmp_path / name).write_text("something of mine")
    code, told = run(tmp_path, "--model", "echo:tokens=2", *options)
    assert code == 2, told
    assert words in " ".join(told.split())
    assert not (tmp_path / "out.jsonl").exists()
    assert (tmp_path / "mine.html").read_text() == "something of mine"
    assert (tmp_path / "other.json").read_text() == "something of mine"


def test_options_of_the_run_are_in_its_report(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl")
    code, told = run(
        tmp_path, "--model", "echo:tokens=2", "--template", "Say {{ prompt }}.", "--sample", "50",
        "--seed", "3", "--rename", "prompt=asked", "--max-errors", "5%", "--errors", "wrong.jsonl",
        "--fields", "seed", "--ordered", "--temperature", "0.5", "--workers", "2",
    )  # fmt: skip
    assert code == 0, told
    found = report_of(tmp_path)
    assert found["rows"]["made"] == found["rows"]["in"] == 50
    settings = found["settings"]
    assert settings["sampling"] == {"seed": 3, "temperature": 0.5}
    assert settings["layout"] == {"template": "Say {{ prompt }}.", "rename": {"prompt": "asked"}}
    assert settings["selection"]["sample"] == 50
    assert (settings["max errors"], settings["ordered"]) == ({"share": 0.05}, True)
    assert (settings["model"], settings["workers"]) == ("echo:tokens=2", 2)
    assert all(sample["prompt"].startswith("Say p") for sample in found["samples"])


def test_a_recipe_has_no_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "batchmill", "run", str(ROOT / "examples/recipes/sums.yaml")]
    done = subprocess.run(
        [*command, "--report", "report.html"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2
    assert "a recipe has none" in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_price_is_of_what_was_asked_for() -> None:
    price = Price.of("0.5,1.5")
    assert price is not None
    nothing = {"prompt": 0, "completion": 0}
    million = {"prompt": 10**6, "completion": 2 * 10**6}
    cost = price.cost({"made": million, "found": million, "cached": nothing})
    assert cost == {"input": 1.0, "output": 6.0, "total": 7.0, "saved": 0.0}
    with pytest.raises(ConfigurationError):
        Price.of("inf,0")


def hostile_report() -> dict[str, Any]:
    """Of a run in which all that strangers say is markup."""
    statistics = RunStatistics()
    statistics.start()
    requests = [
        GenerationRequest(id=HOSTILE[:200], prompt=HOSTILE),
        GenerationRequest(id="chat", messages=[ChatMessage(role=HOSTILE[:60], content=HOSTILE)]),
    ]
    for number, request in enumerate(requests):
        row = Row(number, {}, request.id, request, row=number)
        made = GenerationResult(
            id=request.id,
            text=HOSTILE,
            finish_reason=FinishReason.STOP,
            model=HOSTILE,
            worker=HOSTILE,
            completion_tokens=3,
            timings=JobTimings(queue_s=0.1, total_s=1.0, stage_s=[0.1]),
        )
        statistics.add(row, made, Origin.MADE)
        error = ErrorDetail(code=HOSTILE, message=HOSTILE)
        statistics.add(
            row, GenerationResult.failed(request.id, error, worker=HOSTILE), Origin.FOUND
        )
    return {
        "written": "now",
        "run": HOSTILE,
        "outcome": {"state": "failed", "message": HOSTILE},
        "input": HALF,
        "output": HALF,
        "json": HOSTILE,
        **statistics.as_json(),
        "price": None,
        "cost": None,
        "settings": {HOSTILE: {HOSTILE: [HOSTILE]}},
        "environment": {"system": HOSTILE},
    }


def test_texts_of_strangers_stay_texts() -> None:
    html = Read(page(hostile_report()))
    assert not {"script", "img", "iframe"} & {*html.tags}
    assert not [name for name in html.attributes if name.startswith("on")]
    text = "".join(html.texts)
    assert text.count("<script>alert(1)</script>") >= 12
    assert "{{ 7*7 }}" in text
    assert not re.search("[\u202e\x00\ud800-\udfff]", text)
    plain = Read(page(hostile_report() | {"output": "a", "run": "b"}))
    assert html.tags == plain.tags


def test_the_page_asks_for_nothing() -> None:
    text = page(hostile_report())
    assert "default-src 'none'" in text
    addresses = re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"'\s>)]+)""", text)
    assert {a for a in addresses if not a.startswith("x")} == {"data:,"}


def test_a_report_that_cannot_be_written_costs_no_row(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 2000)
    process = started(tmp_path, "--model", "echo:tokens=20,step_s=0.01,max_num_seqs=64")
    until((tmp_path / "out.jsonl").exists)
    (tmp_path / "report.json").mkdir()
    _, told = process.communicate(timeout=2 * PATIENCE_S)
    assert process.returncode == 0, told
    assert "the report can't be written" in told
    assert len(output_of(tmp_path)) == 2000
