"""What a dataset run tells of how far it is."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from batchmill.offline.report import progress_display
from batchmill.offline.time_left import TimeLeft
from queue_api.datasets.summary import Progress


def test_time_left_is_told_from_the_first_line_on_that_has_new_rows() -> None:
    told = io.StringIO()
    with progress_display(Console(file=told, width=200)) as display:
        display.update(
            Progress(done=40, total=100, errors=0, completion_tokens=80, elapsed_s=2.0, resumed=20)
        )
    assert told.getvalue() == "40/100 rows  10 rows/s  40 tokens/s  ETA 0:00:06\n"


def test_no_time_left_is_told_before_there_is_anything_to_tell_it_by() -> None:
    told = io.StringIO()
    with progress_display(Console(file=told, width=200)) as display:
        display.update(
            Progress(done=20, total=100, errors=1, completion_tokens=0, elapsed_s=2.0, resumed=20)
        )
    assert told.getvalue() == "20/100 rows  0 rows/s  0 tokens/s  1 errors\n"


def progress(done: int, elapsed_s: float, total: int = 10_000) -> Progress:
    return Progress(
        done=done, total=total, errors=0, completion_tokens=done, elapsed_s=elapsed_s, resumed=0
    )


def simulated(seed: int, stop_at: float, speed: Callable[[float], float]) -> list[float]:
    """The seconds that a run has left when a share of it is done: least and most, as told, and what
    it took."""
    draw = random.Random(seed)
    time_left, done, elapsed_s, told, told_at = TimeLeft(), 0.0, 0.0, None, 0.0
    while done < 10_000:
        elapsed_s += 0.1
        done = min(10_000, done + draw.uniform(0, 2) * speed(done / 10_000))
        now = progress(int(done), elapsed_s)
        time_left.note(now)
        if told is None and done >= stop_at * 10_000:
            told, told_at = time_left.seconds(now), elapsed_s
    assert told is not None
    return [*told, elapsed_s - told_at]


@pytest.mark.parametrize("stop_at", [0.1, 0.5, 0.9])
def test_the_range_holds_what_it_takes_and_is_narrow(stop_at: float) -> None:
    held = 0
    for seed in range(100):
        least, most, took = simulated(seed, stop_at, lambda _: 3.0)
        held += least <= took <= most
        assert most < 2 * least
    assert held >= 75


def test_what_was_fast_long_ago_is_forgotten() -> None:
    """Rows of a cache come first, and at once."""
    least, most, took = simulated(1, 0.8, lambda share: 200.0 if share < 0.3 else 2.0)
    assert 0.8 * took < least < most < 1.25 * took


def test_a_range_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchmill.offline.report.PLAIN_EVERY_S", 0.0)
    told = io.StringIO()
    with progress_display(Console(file=told, width=200)) as display:
        for second in range(1, 41):
            display.update(progress(second * 10 + second % 3, float(second)))
        display.update(progress(10_000, 41.0))
    pattern = r"ETA (\d):(\d\d):(\d\d) to (\d):(\d\d):(\d\d)$"
    found = re.search(pattern, told.getvalue(), re.MULTILINE)
    assert found is not None
    times = [int(number) for number in found.groups()]
    assert times[:3] < times[3:]
    assert told.getvalue().endswith("10000/10000 rows  244 rows/s  244 tokens/s  ETA 0:00:00\n")
