"""A folder of Hugging Face's `datasets` as an output, as its `save_to_disk` writes one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from queue_api.datasets.formats.packages import import_pyarrow
from queue_api.datasets.formats.part_sink import PartSink

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["DatasetsSink"]

BATCH_ROWS = 1000
"""As `datasets` itself has."""


class DatasetsSink(PartSink):
    """Shards `part-00000.arrow` and so on, and what makes `datasets.load_from_disk` read them."""

    format = "datasets"
    suffix = ".arrow"
    extra_files = frozenset({"state.json", "dataset_info.json"})

    @staticmethod
    def write_part(path: Path, table: pa.Table) -> None:
        # the form without a table of contents, which is the one that `datasets` maps
        pa = import_pyarrow(path.name)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=BATCH_ROWS)

    @staticmethod
    def read_part(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        pa = import_pyarrow(path.name)
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            there = stream.schema
            wanted = [n for n in there.names if columns is None or n in columns]
            yield there.empty_table().select(wanted)
            for batch in stream:
                yield pa.Table.from_batches([batch]).select(wanted)

    @staticmethod
    def schema_of(path: Path) -> pa.Schema:
        pa = import_pyarrow(path.name)
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            return stream.schema

    def describe(self, parts: Sequence[str]) -> None:
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in parts],
            # by it `datasets` knows what it has computed of this content before
            "_fingerprint": f"{self.content:032x}"[-16:],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        info = {"citation": "", "description": "", "homepage": "", "license": ""}
        self._put_json("dataset_info.json", info)
        self._put_json("state.json", state)

    def _put_json(self, name: str, content: dict[str, Any]) -> None:
        aside = self._state / name
        with aside.open("w") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(self._folder / name)
