"""The page of `--report` in a real browser: Chromium, driven by playwright, where both are there.

`REPORT_PICTURE=docs/report.png` saves its picture, which docs/report.md shows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium, or another"),
]

ROOT = Path(__file__).parent.parent
HOSTILE = "<script>document.title = 'hacked'</script><img src=http://example.com/a.png>"
WINDOWS = {"wide": (1080, 900), "narrow": (390, 800)}
CHARTS = 7


def write_rows(path: Path) -> None:
    """The examples' prompts, several times, and some that are wrong."""
    examples = [json.loads(line) for line in (ROOT / "examples/prompts.jsonl").open()]
    rows = [{**row, "id": f"{row['id']}-{i}"} for i in range(4) for row in examples]
    for i, row in enumerate(rows[::90]):
        row["max_tokens"] = HOSTILE if i % 3 else 1_000_000
    rows += [{"id": HOSTILE, "prompt": HOSTILE}] * 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of the demo model has left its files."""
    folder = tmp_path_factory.mktemp("run")
    write_rows(folder / "prompts.jsonl")
    command = [sys.executable, "-m", "batchmill", "run", "prompts.jsonl", "-o", "answers.jsonl"]
    options = ["--workers", "2", "--stages", "cpu,cpu", "--report", "report.html"]
    subprocess.run(
        [*command, *options, "--price", "0.15,0.60"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=250,
    )
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Seen:
    """A page that is open, and what it did meanwhile."""

    def __init__(self, browser: Any, address: str, size: tuple[int, int], scheme: str) -> None:
        viewport = dict(zip(("width", "height"), size, strict=True))
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)

    def all(self, script: str) -> Any:
        """What the script says of the page."""
        return self.page.evaluate(script)


@pytest.fixture(params=[*WINDOWS])
def seen(request: Any, browser: Any, folder: Path) -> Iterator[Seen]:
    scheme = "dark" if request.param == "narrow" else "light"
    seen = Seen(browser, (folder / "report.html").as_uri(), WINDOWS[request.param], scheme)
    yield seen
    if request.param == "wide" and (place := os.environ.get("REPORT_PICTURE")):
        end = seen.all("document.querySelector('[data-table=counts]').getBoundingClientRect().top")
        clip = {"x": 0, "y": 0, "width": WINDOWS["wide"][0], "height": end - 70}
        seen.page.screenshot(path=place, full_page=True, clip=clip)
    seen.page.close()


def test_the_page_loads_nothing_and_runs_nothing(seen: Seen) -> None:
    assert seen.complaints == []
    assert len(seen.requests) == 1 and seen.requests[0].endswith("/report.html")
    assert "hacked" not in seen.page.title()
    assert seen.all("document.querySelectorAll('script, img, iframe').length") == 0
    told = seen.all("document.querySelector('[data-table=errors]').innerText")
    assert HOSTILE[:20] in told


def test_each_chart_has_marks_that_can_be_seen(seen: Seen) -> None:
    charts = seen.all(
        """[...document.querySelectorAll('[data-chart]')].map(chart => ({
            name: chart.dataset.chart,
            marks: [...chart.querySelectorAll('.bar, .area')].map(mark => {
                const box = mark.getBoundingClientRect();
                return [box.width, box.height, getComputedStyle(mark).fill];
            }),
            width: chart.querySelector('svg').getBoundingClientRect().width,
            ticks: [...chart.querySelectorAll('.ticks span')].map(tick => {
                const box = tick.getBoundingClientRect();
                return [box.left, box.right];
            }),
        }))"""
    )
    assert len(charts) == CHARTS
    for chart in charts:
        drawn = [mark for mark in chart["marks"] if mark[0] > 1 and mark[1] > 1]
        assert drawn, chart
        assert {colour for *_, colour in drawn}.isdisjoint({"none", "rgba(0, 0, 0, 0)"})
        assert chart["width"] > 200
        assert len(chart["ticks"]) >= 2, chart["name"]
        for (_, right), (left, _) in zip(chart["ticks"], chart["ticks"][1:], strict=False):
            assert right < left, f"labels of {chart['name']} lie on each other"


def test_nothing_is_cut_off_at_the_side(seen: Seen) -> None:
    width, inner = seen.all("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner
    outside = seen.all(
        """[...document.querySelectorAll('body *')].filter(each => !each.closest('.scroll')
            && each.getBoundingClientRect().right > innerWidth).map(each => each.outerHTML)"""
    )
    assert outside == []


def test_the_pages_numbers_are_those_of_the_json_and_of_the_output(
    seen: Seen, folder: Path
) -> None:
    report = json.loads((folder / "report.json").read_text())
    rows = [json.loads(line) for line in (folder / "answers.jsonl").open()]
    named = seen.all(
        """Object.fromEntries([...document.querySelectorAll('[data-name]')].map(
            each => [each.dataset.name, each.innerText.trim()]))"""
    )
    shown = {name: int(text.replace(",", "")) for name, text in named.items() if _is_whole(text)}
    answered = [row for row in rows if not row["error"]]
    counted = {
        "now": len(rows),
        "out": len(rows),
        "in": len(rows),
        "before": 0,
        "errors": len(rows) - len(answered),
        "made_prompt": sum(row["usage"]["prompt_tokens"] for row in rows),
        "made_completion": sum(row["usage"]["completion_tokens"] for row in rows),
        "total_count": len(answered),
        "completion_count": len(answered),
    }
    assert {name: shown[name] for name in counted} == counted
    for name in ("made", "out", "in", "before", "errors", "errors_before", "retried"):
        assert shown[name] == report["rows"][name]
    assert float(named["cost"]) == pytest.approx(report["cost"]["total"], rel=1e-3)
    endings = seen.all(
        """[...document.querySelectorAll('[data-table=finish_reasons] tr')].map(
            row => [row.cells[0].innerText, Number(row.cells[1].innerText.replace(',', ''))])"""
    )
    assert dict(endings) == Counter(row["finish_reason"] for row in rows)
    samples = seen.all(
        """[...document.querySelectorAll('[data-sample]')].map(
            each => [Number(each.dataset.sample), each.querySelector('.text').textContent])"""
    )
    texts = {row["row"]: row["text"] for row in rows}
    assert len(samples) == 8
    assert all(texts[row] == text for row, text in samples)


def _is_whole(text: str) -> bool:
    return text.replace(",", "").isdecimal()
