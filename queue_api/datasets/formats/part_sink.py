"""An output of several files of many rows each, for formats that can't be appended to."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from queue_api.datasets.formats.arrow_columns import ArrowColumns
from queue_api.datasets.formats.jsonl_sink import LEAST_FREE_BYTES, sync_folder
from queue_api.datasets.formats.packages import import_pyarrow
from queue_api.datasets.formats.row_journal import RowJournal
from queue_api.datasets.formats.row_sink import (
    MadeRow,
    OutputFile,
    RowSink,
    WrittenRow,
    written_row,
)
from queue_api.datasets.formats.whole_values import line_of_one_type
from queue_api.wire.errors import DatasetError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["DEFAULT_PART_ROWS", "LEDGER_COLUMNS", "PartSink"]

logger = logging.getLogger(__name__)

DEFAULT_PART_ROWS = 50_000
MOST_PART_BYTES = 64 * 2**20
"""Of the rows of a part as lines; they are in memory when it is written."""
LEDGER_COLUMNS = (
    "row",
    "id",
    "text",
    "finish_reason",
    "model",
    "model_revision",
    "error",
    "error_code",
    "fingerprint",
)
"""What of each row is read when the output is opened."""


class PartSink(RowSink):
    """A folder of parts; a subclass says what a part is.

    A row is first in a journal of lines, and when those are many they become a part, which is
    written aside and gets its name in one instant. A row that is in both, as after a crash between
    the two, counts once. The journal stands beside the folder, since what reads folders (polars)
    takes all in them for parts. A last part of few rows is filled up later.

    :param part_rows: how many rows a part has
    :param schema: the types of the input's columns, where it says them
    :raises DatasetError: the folder can't be written, is another's, or is being written
    :raises MissingExtraError: pyarrow isn't installed
    """

    suffix: str
    """Of a part's name."""
    extra_files: frozenset[str] = frozenset()
    """What the folder has besides parts."""

    def __init__(
        self,
        path: Path | str,
        *,
        part_rows: int = DEFAULT_PART_ROWS,
        schema: pa.Schema | None = None,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        super().__init__(str(path))
        self._pa = import_pyarrow(self.name)
        self._folder = Path(os.path.realpath(path))
        self._part_rows = part_rows
        self._columns = ArrowColumns(schema, warn)
        self._parts: dict[str, int] = {}
        """Name to number of rows."""
        self._facts: dict[str, OutputFile] = {}
        self._schemas: dict[str, Any] = {}
        self._is_new = not os.path.lexists(path)
        self._is_broken = False
        """Whether a part couldn't be written: only the files tell then which rows are where."""
        try:
            self._lock = self._locked()
            self._take_up()
        except OSError as error:
            raise self._unwritable(error) from None

    @staticmethod
    @abstractmethod
    def write_part(path: Path, table: pa.Table) -> None:
        """Write a file of rows."""

    @staticmethod
    @abstractmethod
    def read_part(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows of a file in some tables, none of which is large; columns that it lacks are
        left out.

        :raises ValueError: it isn't of this format
        """

    @staticmethod
    @abstractmethod
    def schema_of(path: Path) -> pa.Schema:
        """The columns of a part.

        :raises ValueError: it isn't of this format
        """

    def describe(self, parts: Sequence[str]) -> None:
        """Write what the format has beside its parts, when those have changed."""

    def info(self) -> os.stat_result:
        return os.fstat(self._lock)

    def written(self) -> Iterator[WrittenRow]:
        for name in sorted(self._parts):
            yield from self._rows_of(self._folder / name)
        in_journal = (written_row(row) for row in self._journal.objects())
        yield from (known for known in in_journal if known is not None)

    def finish(self) -> None:
        try:
            self._flush()
            while narrower := self._narrower():
                for name in narrower:
                    tables = list(self.read_part(self._folder / name))
                    self._put_part(name, self._columns.joined(tables))
            self._describe()
        except OSError as error:
            raise self._unwritable(error) from None

    def files(self) -> list[OutputFile]:
        for name in sorted(self._parts):
            if name not in self._facts:
                self._facts[name] = self._look_at(name)
        return [self._facts[name] for name in sorted(self._parts)]

    def close(self, *, keep_empty: bool = True) -> None:
        try:
            if self._is_broken:
                return
            self._flush()
            is_kept = self.rows or keep_empty or not self._is_new
            if is_kept and not self._parts:
                self._put_part(self._name(0), self._columns.schema.empty_table())
            if is_kept:
                self._describe()
            self._journal.close()
            shutil.rmtree(self._state)
            if not is_kept:
                shutil.rmtree(self._folder)
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            os.close(self._lock)

    def _write(self, rows: Sequence[MadeRow]) -> list[None]:
        decimals = self._columns.decimals
        lines = [line_of_one_type(row, decimals) for row in rows]
        try:
            while lines:
                room = max(1, self._part_rows - self._open_rows - self._journal.rows)
                now, lines = lines[:room], lines[room:]
                self._journal.append(now)
                is_full = len(now) == room or self._journal.num_bytes >= MOST_PART_BYTES
                if is_full:
                    self._flush()
        except OSError as error:
            raise self._unwritable(error) from None
        return [None] * len(rows)

    def _drop(self, is_unwanted: Callable[[int], bool]) -> None:
        try:
            self._flush()
            replaced: dict[str, bool] = {}
            for name in sorted(self._parts):
                kept = self._kept(name, is_unwanted)
                if kept is not None:
                    replaced[name] = kept.num_rows > 0
                    if kept.num_rows:
                        self._write_aside(name, kept)
            self._commit(replaced)
            self._forget_parts()
        except OSError as error:
            raise self._unwritable(error) from None

    def _kept(self, name: str, is_unwanted: Callable[[int], bool]) -> pa.Table | None:
        """What stays of a part; None if that is all."""
        kept, has_lost = [], False
        for table in self.read_part(self._folder / name):
            stays = [not is_unwanted(row) for row in table["row"].to_pylist()]
            has_lost = has_lost or not all(stays)
            kept.append(table.filter(self._pa.array(stays, self._pa.bool_())))
        return self._pa.concat_tables(kept) if has_lost else None

    # -------------------------------------------------------------------------- what is there

    def _locked(self) -> int:
        if self._is_new:
            self._folder.mkdir()
            sync_folder(self._folder.parent)
        elif not self._folder.is_dir():
            raise DatasetError(
                f"{self.name} is a file, and this output is a folder of parts; choose another "
                "output"
            )
        lock = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            room = os.fstatvfs(lock)
            if room.f_blocks > 0 and room.f_bavail * room.f_frsize < LEAST_FREE_BYTES:
                raise OSError(28, "No space left on device")
        except BlockingIOError:
            os.close(lock)
            raise DatasetError(f"another process is writing {self.name}") from None
        except OSError:
            os.close(lock)
            raise
        return lock

    @property
    def _state(self) -> Path:
        """A folder for what isn't part of the output yet, beside it."""
        return self._folder.with_name(f".{self._folder.name}.batchmill")

    def _take_up(self) -> None:
        try:
            self._check_ours()
            if self._is_new and self._state.exists():
                shutil.rmtree(self._state)  # of an output that was removed since
            self._state.mkdir(exist_ok=True)
            self._end_commit()
            self._forget_parts()
            self._journal = RowJournal(self._state / "journal.jsonl")
            sync_folder(self._state)
            sync_folder(self._state.parent)
            self._note_journal()
        except BaseException:
            os.close(self._lock)
            raise

    def _check_ours(self) -> None:
        """:raises DatasetError: there is something that we didn't write"""
        for path in self._folder.iterdir():
            if not self.is_part(path.name) and path.name not in self.extra_files:
                raise self._foreign(f"holds {path.name!r}, which batchmill didn't write")

    def _forget_parts(self) -> None:
        """Learn anew which rows are there."""
        self._forget_rows()
        self._parts, self._facts, self._schemas = {}, {}, {}
        for name in sorted(filter(self.is_part, (path.name for path in self._folder.iterdir()))):
            path = self._folder / name
            try:
                self._schemas[name] = self.schema_of(path)
                self._note_part(path)
            except (ValueError, KeyError, OSError) as error:
                raise self._foreign(f"holds {name}, which can't be read: {error}") from None
            self._columns.add(self._schemas[name])

    def _note_part(self, path: Path) -> None:
        if lacking := {"row", "id", "finish_reason"} - set(self._schemas[path.name].names):
            raise ValueError(f"it has no column {min(lacking)!r}")
        self._parts[path.name] = 0
        for known in self._rows_of(path, LEDGER_COLUMNS):
            if known.index in self:
                raise self._foreign(f"holds row {known.index} twice")
            self._note_found(known, None)
            self._parts[path.name] += 1

    def _rows_of(self, path: Path, columns: Sequence[str] | None = None) -> Iterator[WrittenRow]:
        for table in self.read_part(path, columns):
            table.validate(full=True)  # what is damaged mustn't be followed to anywhere
            for row in table.to_pylist():
                if (known := written_row(row)) is None:
                    raise self._foreign(f"holds {path.name}, whose rows batchmill didn't write")
                yield known

    def _note_journal(self) -> None:
        rows = [written_row(row) for row in self._journal.objects()]
        new = [row for row in rows if row is not None and row.index not in self]
        for known in new:
            self._note_found(known, None)
        if not new:
            self._journal.clear()

    # -------------------------------------------------------------------------- writing parts

    @classmethod
    def is_part(cls, name: str) -> bool:
        """Whether a file of the folder is a part."""
        return re.fullmatch(r"part-\d{5,}" + re.escape(cls.suffix), name) is not None

    def _name(self, number: int) -> str:
        return f"part-{number:05}{self.suffix}"

    @property
    def _last(self) -> str | None:
        """The part that is filled up next; None if that is a new one."""
        last = max(self._parts, default=None, key=lambda name: (len(name), name))
        if last is None or self._parts[last] >= self._part_rows:
            return None
        return last if (self._folder / last).stat().st_size < MOST_PART_BYTES // 2 else None

    @property
    def _open_rows(self) -> int:
        """How many rows the last part has, if it isn't full."""
        last = self._last
        return 0 if last is None else self._parts[last]

    def _flush(self) -> None:
        """Make a part of the journal."""
        if not self._journal.rows:
            return
        self._is_broken = True
        table = self._columns.table(self._journal.read())
        last = self._last
        if last is not None:
            earlier = list(self.read_part(self._folder / last))
            table = self._columns.joined([*earlier, table])
        numbers = [int(name[5 : -len(self.suffix)]) for name in self._parts]
        self._put_part(last or self._name(max(numbers, default=-1) + 1), table)
        self._journal.clear()
        self._is_broken = False

    def _narrower(self) -> list[str]:
        """The parts that were written before the schema was as wide as it is now."""
        schema = self._columns.schema
        return [name for name, known in self._schemas.items() if known != schema]

    def _put_part(self, name: str, table: pa.Table) -> None:
        aside = self._write_aside(name, table)
        facts = self._facts_of(name, aside, table)
        aside.rename(self._folder / name)
        sync_folder(self._folder)
        self._parts[name], self._schemas[name] = table.num_rows, table.schema
        self._facts[name] = facts

    def _write_aside(self, name: str, table: pa.Table) -> Path:
        aside = self._state / name
        self.write_part(aside, table)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        return aside

    def _look_at(self, name: str) -> OutputFile:
        path = self._folder / name
        return self._facts_of(name, path, self._pa.concat_tables(self.read_part(path, ["row"])))

    def _facts_of(self, name: str, path: Path, table: pa.Table) -> OutputFile:
        from pyarrow import compute

        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        ends = compute.min_max(table["row"]).as_py()
        size = path.stat().st_size
        return OutputFile(name, table.num_rows, size, digest, ends["min"], ends["max"])

    def _describe(self) -> None:
        self.describe(sorted(self._parts))

    # -------------------------------------------------------------------- all in one instant

    @property
    def _order(self) -> Path:
        """What is to be renamed and removed; where it is, that is done."""
        return self._state / "replace.json"

    def _commit(self, replaced: dict[str, bool]) -> None:
        """Put the parts that lie aside in the place of others, or take those away."""
        if not replaced:
            return
        sync_folder(self._state)
        aside = self._order.with_suffix(".new")
        with aside.open("w") as file:
            json.dump(replaced, file)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(self._order)
        sync_folder(self._state)
        self._end_commit()

    def _end_commit(self) -> None:
        if self._order.exists():
            for name, has_rows in json.loads(self._order.read_text()).items():
                with contextlib.suppress(FileNotFoundError):  # it was done before a crash
                    if has_rows:
                        (self._state / name).rename(self._folder / name)
                    else:
                        (self._folder / name).unlink()
            sync_folder(self._folder)
            self._order.unlink()
        for path in self._state.iterdir():
            if path.name != "journal.jsonl":
                path.unlink()

    def _unwritable(self, error: OSError) -> DatasetError:
        return DatasetError(f"can't write {self.name}: {error.strerror or error}")

    def _foreign(self, what: str) -> DatasetError:
        return DatasetError(f"{self.name} {what}; choose another output")
