"""Charts of a report: SVG for the marks, which stretch, and text beside them, which doesn't.

Only numbers and our own words go into them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from markupsafe import Markup

__all__ = ["Series", "histogram", "over_time"]

WIDTH, HEIGHT = 1000, 100
"""Of an SVG, in its own units."""
MOST_STEPS = 60
MOST_BARS = 40
TICKS = 4


@dataclass(frozen=True)
class Series:
    """One part of a stack of counts."""

    name: str
    colour: str
    """A class of the page's style."""
    counts: Sequence[int]


def over_time(series: Sequence[Series], bucket_s: float, elapsed_s: float, unit: str) -> Markup:
    """A stack of rates, in steps; the last may be longer or shorter than the others."""
    starts = _starts(len(series[0].counts), bucket_s, elapsed_s)
    ends = [*starts[1:], len(series[0].counts)]
    end_s = max(elapsed_s, bucket_s * 0.1)
    times = [min(start * bucket_s, end_s) for start in starts] + [end_s]
    spans = [later - earlier for earlier, later in pairwise(times)]
    rates = [
        [sum(e.counts[i:j]) / span for i, j, span in zip(starts, ends, spans, strict=True)]
        for e in series
    ]
    top = _nice_top(max(map(sum, zip(*rates, strict=True)), default=0.0))
    x = [WIDTH * moment / end_s for moment in times]
    marks, base = [], [0.0] * len(starts)
    for each, values in zip(series, rates, strict=True):
        upper = [low + value for low, value in zip(base, values, strict=True)]
        if any(values):
            marks.append(_area(each.colour, x, base, upper, top))
        base = upper
    for place, (start, end) in enumerate(pairwise(times)):
        parts = ", ".join(
            f"{values[place]:,.4g} {each.name}"
            for each, values in zip(series, rates, strict=True)
            if values[place] or len(series) == 1
        )
        title = f"{duration(start)} to {duration(end)}: {parts or 0} {unit}"
        marks.append(_target(x[place], x[place + 1], title))
    ticks = [(tick / end_s, duration(tick)) for tick in _ticks(0.0, end_s)]
    return _plot(marks, top, ticks, label=f"{unit} over time")


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    is_logarithmic: bool,
    label: str,
    number: Callable[[float], str],
) -> Markup:
    """Bars of counts between edges, all of one width."""
    group = max(1, math.ceil(len(counts) / MOST_BARS))
    bars = [sum(part) for part in _parts(counts, group)]
    size = len(counts) / group  # bars, of which the last may lack a part
    ends = [edges[min(i * group, len(counts))] for i in range(len(bars) + 1)]
    top = _nice_top(max(bars, default=0), is_whole=True)
    step, marks = WIDTH / math.ceil(size), []
    for place, count in enumerate(bars):
        height = HEIGHT * count / top
        # what is there is seen, if it is one among a million
        height = max(height, 1.0) if count else 0.0
        left = place * step
        marks.append(
            f'<rect class="bar c1" x="{left + step * 0.06:.2f}" y="{HEIGHT - height:.2f}" '
            f'width="{step * 0.88:.2f}" height="{height:.2f}"/>'
        )
        span = f"{number(ends[place])} to {number(ends[place + 1])}"
        marks.append(_target(left, left + step, f"{span}: {count:,}"))
    low, high = edges[0], edges[0] + (edges[-1] - edges[0]) * math.ceil(size) / size
    if is_logarithmic:
        low, high = math.log10(edges[0]), math.log10(edges[0])
        high += math.log10(edges[-1] / edges[0]) * math.ceil(size) / size
        found = list(_decades(low, high))
        ticks = [((math.log10(tick) - low) / (high - low), number(tick)) for tick in found]
    else:
        ticks = [((tick - low) / (high - low), number(tick)) for tick in _ticks(low, high)]
    return _plot(marks, top, ticks, label=label)


def duration(seconds: float) -> str:
    """Of a few characters."""
    if seconds >= 3600:
        return f"{seconds / 3600:.3g} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"
    if seconds >= 120:
        return f"{seconds / 60:.3g} min"
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.3g} s"
    if seconds >= 0.001:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} µs"


def _starts(num_buckets: int, bucket_s: float, elapsed_s: float) -> list[int]:
    """The first bucket of each step. A sliver at the end goes to the step before it: a few rows in
    it would look like a peak."""
    size = max(1, math.ceil(num_buckets / MOST_STEPS))
    starts = [*range(0, num_buckets, size)]
    if len(starts) > 1 and elapsed_s - starts[-1] * bucket_s < size * bucket_s / 2:
        starts.pop()
    return starts


def _parts(counts: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (counts[i : i + size] for i in range(0, len(counts), size))


def _nice_top(value: float, *, is_whole: bool = False) -> float:
    """The end of an axis: 1, 2, 2.5 or 5 times a power of ten, not below the value."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1, 2, 5, 10) if is_whole and power < 10 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return next(step * power for step in steps if step * power >= value * 0.9999)


def _ticks(low: float, high: float) -> Iterator[float]:
    """Round numbers between the two, not many."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.9999)
    place = math.ceil(low / step - 1e-9)
    while place * step <= high * (1 + 1e-9):
        yield place * step
        place += 1


def _decades(low: float, high: float) -> Iterator[float]:
    """Powers of ten between the two logarithms, with 2 and 5 times them where there are few."""
    factors = (1,) if high - low > 2.5 else (1, 3) if high - low > 1.2 else (1, 2, 5)
    for power in range(math.floor(low), math.ceil(high) + 1):
        for factor in factors:
            if low <= power + math.log10(factor) <= high:
                yield factor * 10.0**power


def _area(
    colour: str, x: Sequence[float], low: Sequence[float], high: Sequence[float], top: float
) -> str:
    """Where the part has any: elsewhere its outline would lie on that of the part below it."""

    def line(values: Sequence[float], steps: Sequence[int]) -> list[str]:
        corners = []
        for place in steps:
            y = HEIGHT * (1 - values[place] / top)
            corners += [f"{x[place]:.2f} {y:.2f}", f"{x[place + 1]:.2f} {y:.2f}"]
        return corners

    filled, outline = [], []
    for is_there, group in groupby(range(len(high)), lambda place: high[place] > low[place]):
        if is_there:
            steps = [*group]
            upper = line(high, steps)
            filled.append(f"M{'L'.join([*upper, *reversed(line(low, steps))])}Z")
            outline.append(f"M{'L'.join(upper)}")
    return (
        f'<path class="area {colour}" d="{"".join(filled)}"/>'
        f'<path class="line {colour}" d="{"".join(outline)}"/>'
    )


def _target(left: float, right: float, title: str) -> str:
    """What the pointer rests on to be told a number."""
    title = str(Markup.escape(title))
    return (
        f'<rect class="target" x="{left:.2f}" y="0" width="{right - left:.2f}" '
        f'height="{HEIGHT}"><title>{title}</title></rect>'
    )


def _plot(
    marks: Sequence[str], top: float, ticks: Sequence[tuple[float, str]], *, label: str
) -> Markup:
    rules = "".join(
        f'<line class="rule" x1="0" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        for y in (0.0, HEIGHT / 2)
    )
    heights = "".join(
        f'<span style="bottom:{100 * part:.0f}%">{_short(top * part)}</span>'
        for part in (0.0, 0.5, 1.0)
    )
    below = "".join(
        f'<span class="{_side(place)}" style="left:{100 * place:.2f}%">{words}</span>'
        for place, words in ticks
    )
    return Markup(
        f'<div class="plot"><div class="heights">{heights}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{Markup.escape(label)}">{rules}{"".join(marks)}'
        f'<line class="axis" x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/></svg>'
        f'<div class="ticks">{below}</div></div>'
    )


def _side(place: float) -> str:
    return "first" if place < 0.04 else "last" if place > 0.96 else "between"


def _short(value: float) -> str:
    """A number for an axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.4g}"
