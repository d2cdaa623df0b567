"""Which files an input is: itself, those that a pattern matches, or those of a folder."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from queue_api.wire.errors import DatasetError

__all__ = ["Folder", "chosen_files", "local_files"]

_DATA = re.compile(
    r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|feather|txt)(\.(gz|zst|bz2|xz))?$", re.IGNORECASE
)
_ABOUT = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
"""Beside the data of `datasets`, and no data."""
_SPLIT = re.compile(
    r"(?:^|[/_.-])(train|test|validation|valid|val|dev|eval)(?:ing|uation)?(?=[/_.-])"
)
_MOST_SHOWN = 10


@dataclass(frozen=True)
class Folder:
    """A folder on some file system."""

    name: str
    """As the user gave it."""
    files: Sequence[str]
    """All in it and below it, relative, sorted, parted by `/`."""
    read: Callable[[str], bytes]
    """One of them."""


def local_files(name: str, output: str = "") -> list[str]:
    """The files of this machine that a name, a pattern or a folder stands for, in order.

    :param output: what is written; a pattern or a folder leaves it out
    :raises DatasetError: a pattern matches nothing, or a folder has no data that goes together
    """
    if not os.path.lexists(name) and glob.has_magic(name):
        found = [path for path in glob.glob(name, recursive=True) if not Path(path).is_dir()]  # noqa: PTH207
        found = sorted(path for path in found if not _is_of(path, output))
        if not found:
            raise DatasetError(f"no file matches {name!r}")
        return found
    folder = Path(name)
    if not folder.is_dir():
        return [name]
    folder = _snapshot(folder)
    files = sorted(
        path.relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        for path in (Path(parent, each) for each in names)
        if not _is_of(path, output)
    )
    chosen = chosen_files(Folder(name, files, lambda file: (folder / file).read_bytes()))
    return [str(folder / file) for file in chosen]


def _snapshot(folder: Path) -> Path:
    """The revision of a data set in the Hub's cache; any other folder is itself."""
    snapshots, ref = folder / "snapshots", folder / "refs" / "main"
    if not snapshots.is_dir():
        return folder
    if ref.is_file() and (named := snapshots / ref.read_text().strip()).is_dir():
        return named
    revisions = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(revisions) != 1:
        shown = ", ".join(path.name for path in revisions) or "none"
        raise DatasetError(f"{folder} has the revisions {shown}: name one, in {snapshots}")
    return revisions[0]


def chosen_files(folder: Folder) -> list[str]:
    """Those of a folder that hold its rows.

    :raises DatasetError: there are none, or of several splits, folders or formats
    """
    if "dataset_dict.json" in folder.files:
        return _of_split(folder)
    if "state.json" in folder.files:
        return _of_state(folder, "state.json")
    found = [file for file in folder.files if _is_data(file)]
    if not found:
        raise DatasetError(f"the folder {folder.name} has no data files (.jsonl, .parquet, …)")
    for kind, of in (("splits", _split_of), ("folders", _folder_of), ("formats", _format_of)):
        groups = sorted({of(file) for file in found})
        if len(groups) > 1:
            shown = ", ".join(map(repr, groups[:_MOST_SHOWN]))
            example = {"splits": f"**/*{groups[-1]}*", "folders": f"{groups[-1]}/*"}
            pattern = example.get(kind, f"**/*{groups[-1]}")
            raise DatasetError(
                f"the folder {folder.name} has files of several {kind}: {shown}. Say which, by a "
                f"pattern in quotes such as '{folder.name.rstrip('/')}/{pattern}'"
            )
    return found


def _of_split(folder: Folder) -> list[str]:
    splits = [str(split) for split in json.loads(folder.read("dataset_dict.json"))["splits"]]
    if len(splits) != 1:
        shown = ", ".join(map(repr, splits))
        example = f"{folder.name.rstrip('/')}/{splits[0]}" if splits else "none"
        raise DatasetError(f"{folder.name} has the splits {shown}: name one, such as {example}")
    return _of_state(folder, f"{splits[0]}/state.json")


def _of_state(folder: Folder, file: str) -> list[str]:
    """What `datasets` wrote, in its order."""
    try:
        state = json.loads(folder.read(file))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        moved = state.get("_indices_data_files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{folder.name} isn't a whole folder of `datasets`: {file} can't be read: {error!r}"
        ) from None
    if moved:
        raise DatasetError(
            f"the rows of {folder.name} are in another order than its files: write them anew with "
            "flatten_indices().save_to_disk(…)"
        )
    return [(PurePosixPath(file).parent / name).as_posix() for name in names]


def _is_data(file: str) -> bool:
    parts = file.split("/")
    is_hidden = any(part.startswith((".", "_")) for part in parts)
    return not is_hidden and parts[-1] not in _ABOUT and _DATA.search(file) is not None


def _split_of(file: str) -> str:
    found = _SPLIT.findall(file.lower())
    return found[-1] if found else ""


def _folder_of(file: str) -> str:
    return str(PurePosixPath(file).parent)


def _format_of(file: str) -> str:
    found = _DATA.search(file)
    return "" if found is None else f".{found[1].lower()}"


def _is_of(file: Path | str, output: str) -> bool:
    """True if a run wrote the file: its output, a part of it, or its certificate."""
    if output in ("", "-"):
        return False
    # pathlib's own raises of a loop of links
    real, written = (Path(os.path.realpath(path)) for path in (file, output))
    return real == Path(f"{written}.certificate.json") or real.is_relative_to(written)
