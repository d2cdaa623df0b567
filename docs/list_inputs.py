"""Writes the table of docs/inputs.md from tests/kits/input_files.py: `make inputs`."""

from __future__ import annotations

import sys
from pathlib import Path

from kits.input_files import FILES, InputFile

HEAD = """# Inputs, one by one

Each of these files is made and run by `tests/test_dataset_inputs.py`, with a worker that says which
prompt it got; `make inputs` writes this table from the same list. The layouts are those of public
files, the rows are made up. Every row in is a row out, with the text of its own prompt or with an
error; a file that can't be read is refused in a line, with exit code 2. How a format is told is in
[datasets.md](datasets.md#inputs).

"""
COLUMNS = ("input", "what it is", "options", "rows in", "rows out", "with text", "with an error")


def page() -> str:
    """The whole page."""
    lines = [f"| {' | '.join((*COLUMNS, 'what is told'))} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in map(_cells, FILES)]
    return HEAD + "\n".join(lines) + "\n"


def _cells(file: InputFile) -> list[str]:
    with_text = sum(text is not None for text in file.asked)
    numbers = (len(file.asked), len(file.asked), with_text, len(file.asked) - with_text)
    shown = [""] * 4 if file.refused and not file.asked else map(str, numbers)
    options = f"`{file.options}`" if file.options else ""
    told = f"{'**refused**: ' if file.refused else ''}{file.told}".replace("|", "\\|")
    return [f"`{file.name}`", file.about, options.replace("|", "\\|"), *shown, told]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
