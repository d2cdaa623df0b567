"""`batchmill run --report`: a page about the run, and JSON beside it, written when it ends."""

from __future__ import annotations

import asyncio
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from batchmill.offline.report_page import MARK, page
from engine.control_group import cpus_allowed
from queue_api.datasets.certificate import put_in_place
from queue_api.datasets.run import Dataset
from queue_api.datasets.run_statistics import RunStatistics
from queue_api.wire.errors import ConfigurationError, RowsFailedError

__all__ = ["Price", "RunReport"]

FORM = 1
PACKAGES = ("batchmill", "torch", "transformers", "redis", "rq")


@dataclass(frozen=True)
class Price:
    """Of a million tokens, in whatever currency."""

    input: float
    output: float

    @classmethod
    def of(cls, given: str | None) -> Price | None:
        """What `0.15,0.60` means.

        :raises ConfigurationError: it isn't two numbers
        """
        if given is None:
            return None
        try:
            prices = [float(part) for part in given.split(",")]
        except ValueError:
            prices = []
        if len(prices) != 2 or not all(math.isfinite(each) and each >= 0 for each in prices):
            raise ConfigurationError(
                f"the price is {given!r:.40}: give that of a million prompt tokens and that of a "
                "million generated ones, such as 0.15,0.60"
            )
        return cls(*prices)

    def cost(self, tokens: dict[str, dict[str, int]]) -> dict[str, float]:
        """Of the tokens of a report: each row is paid for in the run that writes it."""
        paid = [tokens["made"], tokens["found"]]
        prompt = sum(each["prompt"] for each in paid) * self.input / 1e6
        completion = sum(each["completion"] for each in paid) * self.output / 1e6
        cached = tokens["cached"]
        saved = (cached["prompt"] * self.input + cached["completion"] * self.output) / 1e6
        total = prompt + completion
        return {"input": prompt, "output": completion, "total": total, "saved": saved}


@dataclass(frozen=True)
class RunReport:
    """Where a run's report goes."""

    place: Path
    price: Price | None = None

    @property
    def json_place(self) -> Path:
        """The JSON's, beside the page."""
        return self.place.with_suffix(".json")

    def check(self, others: Iterable[str]) -> None:
        """Find what would make it impossible in the end.

        :param others: what the run writes besides
        :raises ConfigurationError: saying what
        """
        if self.place.suffix.lower() not in (".html", ".htm"):
            raise ConfigurationError(
                f"--report is {str(self.place)!r}: name a page, such as report.html; its JSON is "
                "written beside it"
            )
        folder = self.place.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ConfigurationError(f"can't write {self.place}: no folder {folder} to write to")
        taken = {os.path.realpath(other) for other in others}
        for path, is_ours in ((self.place, _is_page), (self.json_place, _is_report)):
            if os.path.realpath(path) in taken or (path.exists() and not is_ours(path)):
                raise ConfigurationError(
                    f"--report would write {path}, which isn't a report: take another name"
                )

    @contextmanager
    def written_at_end(
        self, dataset: Dataset, settings: Mapping[str, Any], warn: Callable[[str], None]
    ) -> Iterator[RunStatistics]:
        """Gather; write however the run ends, if it began.

        :param settings: what the run was started with, as it is to be shown
        """
        statistics = RunStatistics()
        outcome = {"state": "complete", "message": ""}
        try:
            yield statistics
        except BaseException as error:
            outcome = _outcome(error)
            raise
        finally:
            if statistics.is_started:
                content = self._content(dataset, statistics, outcome)
                self._write(content | {"settings": settings, "environment": _environment()}, warn)

    def _content(
        self, dataset: Dataset, statistics: RunStatistics, outcome: dict[str, str]
    ) -> dict[str, Any]:
        content = {
            "report": FORM,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "run": dataset.run_id,
            "outcome": outcome,
            "input": dataset.data.source.name,
            "output": dataset.sink.name,
            "json": self.json_place.name,
            **statistics.as_json(),
        }
        cost = self.price and self.price.cost(content["tokens"])
        return content | {"price": self.price and vars(self.price), "cost": cost}

    def _write(self, content: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        try:
            put_in_place(self.json_place, json.dumps(content, indent=1, ensure_ascii=False))
            put_in_place(self.place, page(content))
        except OSError as error:
            # the rows are on disk; that isn't undone by a report that can't be
            warn(f"the report can't be written: {self.place}: {error.strerror or error}")


def _outcome(error: BaseException) -> dict[str, str]:
    if isinstance(error, RowsFailedError):
        return {"state": "too many errors", "message": str(error)}
    if isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
        return {"state": "broken off", "message": "The same command goes on from here."}
    return {"state": "failed", "message": str(error) or type(error).__name__}


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK.encode() in file.read(200)


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(20).startswith(b'{\n "report": ')


def _environment() -> dict[str, Any]:
    """Of this process, and so of workers that it starts."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "CPUs": cpus_allowed(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **found,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "unknown"
