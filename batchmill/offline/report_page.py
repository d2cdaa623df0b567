"""A report as a page that needs nothing but itself: no script, no request.

It says what the report's JSON says; texts in it are strangers', and escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import zip_longest
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from batchmill.offline.charts import Series, duration, histogram, over_time
from queue_api.wire.plain_text import visible

__all__ = ["MARK", "page"]

MARK = "<!-- a report of batchmill run -->"
"""Tells such pages from others."""
TEMPLATE = "report_page.html.jinja"
MOST_WORKERS = 16
"""Beyond that the page has their sum alone."""

_ORIGINS = {
    "made": "answered now",
    "found": "answered before, written now",
    "cached": "from the cache",
}
_TIMES = {
    "queue": "queue",
    "time_to_first_token": "first token",
    "decode": "decode",
    "total": "total",
}


def page(report: Mapping[str, Any]) -> str:
    """The whole page.

    :param report: as the JSON has it
    """
    return _template().render(
        report=report,
        mark=Markup(MARK),
        origins=_ORIGINS,
        times=_TIMES,
        throughput=list(_throughput(report)),
        spreads=list(_spreads(report)),
        lengths=list(_lengths(report)),
        endings=_endings(report),
        stages=_stages(report),
    )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "whole": lambda value: "unknown" if value is None else f"{value:,.0f}",
        "rate": lambda value: f"{value:,.0f}" if value >= 100 else f"{value:,.3g}",
        "money": lambda value: f"{value:,.2f}" if value >= 1 else f"{value:.4g}",
        "share": lambda value: f"{value:.0%}" if value >= 0.1 else f"{value:.1%}",
        "duration": lambda value: "-" if value is None else duration(value),
        "harmless": visible,
        "words": _words,
    }
    source = files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source)


def _words(value: Any) -> str:
    """A setting, for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{visible(str(name))} {_words(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return visible(str(value))


def _throughput(report: Mapping[str, Any]) -> Iterator[tuple[str, list[Series], Markup]]:
    times = report["over_time"]
    made = [rows - bad for rows, bad in zip(times["made"], times["errors"], strict=True)]
    rows = [
        Series(_ORIGINS["made"], "c1", made),
        Series(_ORIGINS["found"], "c3", times["found"]),
        Series(_ORIGINS["cached"], "c2", times["cached"]),
        Series("errors", "bad", times["errors"]),
    ]
    rows = [each for each in rows if any(each.counts)] or rows[:1]
    for title, series, unit in (
        (
            "Generated tokens per second",
            [Series("generated", "c1", times["completion_tokens"])],
            "tokens/s",
        ),
        ("Rows per second", rows, "rows/s"),
    ):
        drawn = over_time(series, times["bucket_s"], report["elapsed_s"], unit)
        yield title, series, drawn


def _spreads(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Markup]]:
    titles = {
        "queue": "Time in the queue",
        "time_to_first_token": "Time to the first token",
        "decode": "Time of decoding",
    }
    for name, title in titles.items():
        if (spread := report["times_s"][name])["count"]:
            yield title, spread, _drawn(spread, title)


def _lengths(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Markup]]:
    for name, title in (("prompt", "Prompt lengths"), ("completion", "Generated lengths")):
        if (spread := report["lengths"][name])["count"]:
            yield title, spread, _drawn(spread, title)


def _drawn(spread: Mapping[str, Any], title: str) -> Markup:
    is_logarithmic = spread["scale"] == "log"
    return histogram(
        spread["edges"],
        spread["counts"],
        is_logarithmic=is_logarithmic,
        label=title,
        number=duration if is_logarithmic else "{:,.0f}".format,
    )


def _endings(report: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """Finish reason, rows and share of the most frequent."""
    counts: dict[str, int] = {}
    for endings in report["finish_reasons"].values():
        for name, count in endings.items():
            counts[name] = counts.get(name, 0) + count
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return [(name, count, count / ordered[0][1]) for name, count in ordered]


def _stages(report: Mapping[str, Any]) -> list[tuple[str, Sequence[tuple[float, float]]]]:
    """To each worker, or to all: how long each stage was at work, and which share of the time."""
    elapsed_s = report["elapsed_s"] or 1.0
    workers = [worker for worker in report["workers"] if any(worker["stage_s"])]
    if len(workers) > MOST_WORKERS:
        by_stage = zip_longest(*(worker["stage_s"] for worker in workers), fillvalue=0.0)
        each = elapsed_s * len(workers)
        return [
            (f"all {len(workers)} workers", [(busy, busy / each) for busy in map(sum, by_stage)])
        ]
    return [
        (worker["worker"], [(busy, busy / elapsed_s) for busy in worker["stage_s"]])
        for worker in workers
    ]
