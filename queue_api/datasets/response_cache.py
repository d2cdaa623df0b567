"""Results by what made them, kept between runs."""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from queue_api.datasets.draws import is_drawn
from queue_api.datasets.formats.maker import Maker
from queue_api.wire.errors import DatasetError
from queue_api.wire.schemas import GenerationRequest, GenerationResult

__all__ = ["ResponseCache"]

_WHOSE_ALONE = {"id", "metadata", "timeout_s", "deadline"}
"""Fields of a request that have no part in its text."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (key BLOB PRIMARY KEY, result BLOB NOT NULL) WITHOUT ROWID
"""
WAIT_S = 30
"""So long another process may be writing."""


class ResponseCache:
    """A folder with an SQLite database of results.

    A result is kept under a digest of its model's revision and of its request, but for whose it is;
    so it is the one that the model would make again. What is drawn without a seed isn't kept, nor
    are errors. Processes may share a folder.

    :param scope: the workers' settings that texts depend on; results of others aren't found
    :raises DatasetError: from every method: the database can't be used
    """

    def __init__(self, folder: Path | str, scope: str = "") -> None:
        self._scope = scope
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(
                self._folder / "responses.sqlite", timeout=WAIT_S, check_same_thread=False
            )
            self._base.execute("PRAGMA journal_mode=WAL")
            # what a power cut loses is made again
            self._base.execute("PRAGMA synchronous=NORMAL")
            self._base.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def close(self) -> None:
        """Let go of the database."""
        self._base.close()

    def find(self, request: GenerationRequest, maker: Maker) -> GenerationResult | None:
        """What the model made of such a request before, under its own id; None if none is kept."""
        if is_drawn(request):
            return None
        try:
            found = self._base.execute(
                "SELECT result FROM responses WHERE key = ?", (self._key(request, maker),)
            ).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        if found is None:
            return None
        try:
            kept = GenerationResult.model_validate_json(zlib.decompress(found[0]))
        except (ValidationError, zlib.error):
            return None  # of another version, or damaged: it is made again
        return kept.model_copy(update={"id": request.id, "metadata": request.metadata})

    def keep(self, made: Iterable[tuple[GenerationRequest, GenerationResult]]) -> None:
        """Keep results, each with what asked for it."""
        rows = [
            (self._key(request, maker), zlib.compress(_json(result), 1))
            for request, result in made
            if result.ok and (maker := Maker.of(result)) and not is_drawn(request, result)
        ]
        try:
            with self._base:
                self._base.executemany("INSERT OR IGNORE INTO responses VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def _key(self, request: GenerationRequest, maker: Maker) -> bytes:
        asked = request.model_dump_json(exclude_unset=True, exclude=_WHOSE_ALONE)
        parts = (self._scope, maker.revision or maker.model, asked)
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()

    def _unusable(self, error: Exception) -> DatasetError:
        return DatasetError(
            f"the cache in {self._folder} can't be used: {error}; remove it or "
            "choose another folder"
        )


def _json(result: GenerationResult) -> bytes:
    kept = result.model_dump_json(exclude_unset=True, exclude={"id", "run", "index", "metadata"})
    return b'{"id":"0",' + kept.encode()[1:]
