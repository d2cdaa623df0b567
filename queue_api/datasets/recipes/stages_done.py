"""StagesDone: which stages of a recipe are done with what, beside their files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from queue_api.datasets.certificate import put_in_place

__all__ = ["StagesDone"]

FORM = 1


class StagesDone:
    """Remembers, of each stage whose rows are all answered, the mark of what it was asked with, and
    its files' size and time: as long as all that stands, nothing of it has to be read again.

    Lost or damaged, it costs that reading, no row.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "done.json"
        self._stages: dict[str, dict[str, Any]] = {}
        try:
            found = json.loads(self._path.read_bytes())
            if found["form"] == FORM:
                self._stages = dict(found["stages"])
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def has(self, name: str, mark: str) -> bool:
        """Whether the stage is done with that, and its files are those of then."""
        known = self._stages.get(name)
        if not isinstance(known, dict) or known.get("mark") != mark:
            return False
        files: dict[str, list[int]] = known.get("files", {})
        return files == _states(map(Path, files))

    def mark(self, name: str) -> str:
        """What tells the stage's answers from others."""
        return json.dumps(self._stages.get(name))

    def said(self, name: str) -> dict[str, Any]:
        """What was noted of it besides."""
        return dict(self._stages[name]["said"])

    def note(self, name: str, mark: str, files: Iterable[Path], **said: Any) -> None:
        """The stage is done."""
        self._stages[name] = {"mark": mark, "files": _states(files), "said": said}
        put_in_place(self._path, json.dumps({"form": FORM, "stages": self._stages}, indent=1))


def _states(files: Iterable[Path]) -> dict[str, list[int]]:
    states = {}
    for file in files:
        try:
            info = file.stat()
        except OSError:
            states[os.path.realpath(file)] = [-1]
        else:
            states[os.path.realpath(file)] = [info.st_size, info.st_mtime_ns, info.st_ino]
    return states
