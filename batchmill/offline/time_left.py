"""How long a run will take yet, as a range: from its rate lately, and how much that varies."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

from queue_api.datasets.summary import Progress

__all__ = ["TimeLeft"]

MARK_EVERY_S = 0.5
MOST_MARKS = 40
"""Then every second one is left out, and they come half as often."""
FEWEST_RATES = 4
"""Of fewer nothing is told of how much they vary."""


class TimeLeft:
    """Is told of progress, and says what follows."""

    def __init__(self) -> None:
        self._every_s = MARK_EVERY_S
        self._marks: list[tuple[float, int]] = [(0.0, 0)]
        """Seconds, and rows of this life that were done by then."""

    def note(self, progress: Progress) -> None:
        """How far it is now."""
        if progress.elapsed_s < self._marks[-1][0] + self._every_s:
            return
        self._marks.append((progress.elapsed_s, progress.done - progress.resumed))
        if len(self._marks) > MOST_MARKS:
            self._marks = self._marks[::2]
            self._every_s *= 2

    def seconds(self, progress: Progress) -> tuple[float, float] | None:
        """At least and at most, most likely; None where there is nothing to tell it by.

        The rate is the mean over the later half of the time. What is still to come varies as what
        was, so two standard errors are of both: of so many intervals, and of as many as will come.
        """
        new = progress.done - progress.resumed
        if progress.total is None or not new or not progress.elapsed_s:
            return None
        left = progress.total - progress.done
        marks = self._marks[len(self._marks) // 2 - 1 :] if len(self._marks) > 2 else []
        rates = [(n - m) / (later - earlier) for (earlier, m), (later, n) in pairwise(marks)]
        mean = sum(rates) / len(rates) if rates else 0.0
        if len(rates) < FEWEST_RATES or not mean:
            over_all = left * progress.elapsed_s / new
            return over_all, over_all
        to_come = max(left / mean * len(rates) / (marks[-1][0] - marks[0][0]), 1.0)
        around = 2 * statistics.stdev(rates) * math.sqrt(1 / len(rates) + 1 / to_come)
        return left / (mean + around), left / max(mean - around, mean / 4)
