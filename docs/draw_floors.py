"""Draws docs/floors.svg from the imports that the sources have: `make floors`.

A staircase of wings, the topmost first. A line leaves a wing to the right and turns down into each
wing that it imports; the number where it turns counts the pairs of an importing and an imported
file. An import that ran up would have to turn up, and `tests/test_floors.py` would fail.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from kits.house import HOUSE, ROOT, WINGS, Graph, graph, wing_of

FLOORS = {
    "batchmill": ("the face and the command", "#7d55a8"),
    "workers": ("one worker process", "#b4622f"),
    "engine": ("tokens in, tokens out", "#2f7d5b"),
    "queue_api": ("what producers stand on", "#35679b"),
}
ROW, STEP, BOX = 34, 31, 24  # pixels, as all lengths here
LEFT, EDGE, LETTER = 350, 14, 6.6


def pairs(found: Graph) -> Counter[tuple[str, str]]:
    """By importing and imported wing: how many files of the one import how many of the other."""
    counted: Counter[tuple[str, str]] = Counter()
    for module, others in found.items():
        for other in others:
            importer, imported = wing_of(module), wing_of(other)
            # `from a import b` names a only for b's sake
            spare = any(deeper.startswith(f"{other}.") for deeper in others)
            if importer and imported and importer != imported and not spare:
                counted[importer, imported] += 1
    return counted


def label(floor: str, names: tuple[str, ...]) -> str:
    """A wing as its box names it: its folder, or the files that belong together."""
    folder = (ROOT / floor / names[0]).is_dir()
    return f"{names[0]}/" if folder else ", ".join(f"{name}.py" for name in names)


def draw(found: Graph) -> str:
    """The picture as SVG."""
    counted = pairs(found)
    touched = {wing for pair in counted for wing in pair}
    rows = [wing for wing in WINGS if wing in touched]
    right = {wing: LEFT + STEP * row for row, wing in enumerate(rows)}  # of the wing's box
    middle = {wing: EDGE + ROW * row + ROW // 2 for row, wing in enumerate(rows)}
    column = {wing: right[wing] - STEP // 2 for wing in rows}  # where lines come down
    width, height = LEFT + STEP * len(rows), 2 * EDGE + ROW * len(rows)
    bands, lines, marks, boxes = [], [], [], []

    for floor, wings in HOUSE.items():
        says, colour = FLOORS[floor]
        here = [wing for wing in rows if wing.startswith(f"{floor}.")]
        top, deep = middle[here[0]] - ROW // 2, ROW * len(here)
        bands.append(
            f'<rect x="0" y="{top}" width="{width}" height="{deep}" fill="{colour}" '
            f'fill-opacity="0.09"/>'
            f'<text x="{EDGE}" y="{top + 24}" font-size="17" font-weight="bold" '
            f'fill="{colour}">{floor}/</text>'
            f'<text x="{EDGE}" y="{top + 43}" fill="#444">{says}</text>'
        )
        for names in wings:
            wing = f"{floor}.{names[0]}"
            if wing in touched:
                text = label(floor, names)
                wide = round(len(text) * LETTER) + 16
                boxes.append(
                    f'<rect x="{right[wing] - wide}" y="{middle[wing] - BOX // 2}" '
                    f'width="{wide}" height="{BOX}" rx="4" fill="{colour}"/>'
                    f'<text x="{right[wing] - wide // 2}" y="{middle[wing] + 4}" '
                    f'text-anchor="middle" fill="white">{text}</text>'
                )

    for importer in rows:
        colour = FLOORS[importer.partition(".")[0]][1]
        below = [wing for wing in rows if counted[importer, wing]]
        for imported in below:
            number = counted[importer, imported]
            x, y = column[imported], middle[importer]
            end = middle[imported] - BOX // 2
            thick = f"{0.8 + 0.16 * min(number, 15):.1f}"
            lines.append(
                f'<path d="M{right[importer]} {y}H{x}V{end}" fill="none" '
                f'stroke="{colour}" stroke-width="{thick}" stroke-opacity="0.55"/>'
                f'<path d="M{x - 4} {end - 7}h8l-4 7z" fill="#444"/>'
            )
            marks.append(
                f'<circle cx="{x}" cy="{y}" r="9" fill="white" stroke="{colour}"/>'
                f'<text x="{x}" y="{y + 4}" font-size="11" text-anchor="middle" '
                f'fill="#222">{number}</text>'
            )

    parts = [*bands, *lines, *boxes, *marks]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12">\n'
        "<title>The wings of the house, top to bottom, and who imports whom</title>\n"
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(graph()), encoding="utf-8")
