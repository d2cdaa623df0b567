"""How a stream of numbers is spread, in bounded memory: count, sum, quantiles and a histogram."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from queue_api.datasets.summary import Quantiles

__all__ = ["Distribution"]

BINS_A_DECADE = 16
SMALLEST = 1e-6
"""What is smaller counts as this on a logarithmic axis."""
AT_A_TIME = 1000
MOST_BINS = 64
"""Of equal width; the width doubles when a value lies beyond."""


class Distribution:
    """Count, sum, least, greatest and histogram are exact, quantiles as those of Quantiles."""

    def __init__(self, *, is_logarithmic: bool) -> None:
        """:param is_logarithmic: each bin is as many times as wide as that before it, as befits
        times; else the numbers are integers and all bins have one width, a power of two
        """
        self._pending: list[float] = []
        """Not yet counted: many at a time cost a third of what they would one by one."""
        self._sum = 0.0
        self._least = math.inf
        self._greatest = -math.inf
        self._is_logarithmic = is_logarithmic
        self._quantiles = Quantiles()
        self._bins: Counter[int] = Counter()
        self._width = 1

    def add(self, value: float) -> None:
        """Count one, which isn't negative."""
        self._pending.append(value)
        if len(self._pending) >= AT_A_TIME:
            self._count()

    def _count(self) -> None:
        values, self._pending = self._pending, []
        if not values:
            return
        self._sum += sum(values)
        self._least = min(self._least, *values)
        self._greatest = max(self._greatest, *values)
        for value in values:
            self._quantiles.add(value)
        if self._is_logarithmic:
            log, floor = math.log10, math.floor
            self._bins.update([floor(log(max(SMALLEST, v)) * BINS_A_DECADE) for v in values])
            return
        while self._greatest >= self._width * MOST_BINS:
            self._widen()
        self._bins.update([int(value) // self._width for value in values])

    def _widen(self) -> None:
        self._width *= 2
        wider: Counter[int] = Counter()
        for place, count in self._bins.items():
            wider[place // 2] += count
        self._bins = wider

    def as_json(self) -> dict[str, Any]:
        """What a report has of it; without numbers, the count alone."""
        self._count()
        count = self._quantiles.count
        if not count:
            return {"count": 0}
        places = range(min(self._bins), max(self._bins) + 1)
        return {
            "count": count,
            "sum": self._sum,
            "mean": self._sum / count,
            "min": self._least,
            "p50": self._quantiles.at(0.5),
            "p90": self._quantiles.at(0.9),
            "p99": self._quantiles.at(0.99),
            "max": self._greatest,
            "scale": "log" if self._is_logarithmic else "linear",
            "edges": [self._edge(place) for place in (*places, places[-1] + 1)],
            "counts": [self._bins[place] for place in places],
        }

    def _edge(self, place: int) -> float:
        """Where a bin begins."""
        if self._is_logarithmic:
            return float(10 ** (place / BINS_A_DECADE))
        return place * self._width
