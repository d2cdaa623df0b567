"""Where a model's files are and which of them a stage needs.

Weights are read from safetensors alone: other formats can run code when they are loaded.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from engine.models.model_files import brief, check_model_files, read_object
from queue_api.wire.errors import ModelNotFoundError, UnsupportedModelError

__all__ = ["Checkpoint", "layer_of"]

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_FIRST_NUMBER = re.compile(r"^(.*?)\.?(\d+)\.")
_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 1024


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder, its name and revision, and the file of each of its tensors."""

    folder: Path
    name: str
    revision: str | None
    weight_map: dict[str, str]
    """Tensor name to file name."""
    hub_id: str | None = None
    """Set when weight files are still to be fetched from the Hub, each on first need."""

    @classmethod
    def find(
        cls, model: str, revision: str | None = None, *, trust_remote_code: bool = False
    ) -> Checkpoint:
        """Look up a local folder or a Hub id, and fetch all but the weights of the latter.

        :raises ModelNotFoundError: saying what is missing, and where
        :raises UnsupportedModelError: naming a file that is damaged, and the field
        """
        folder = Path(model).expanduser()
        if folder.is_dir():
            weight_map = _read_folder(folder)
            return cls(folder, folder.resolve().name, _content_hash(folder, weight_map), weight_map)
        if folder.exists():
            raise ModelNotFoundError(f"{model} is a file; give the folder that it is in")
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise ModelNotFoundError(f"no model folder {model}")
        patterns = [*SMALL_FILES, *(["*.py"] if trust_remote_code else [])]
        with _hub_errors(model, revision):
            try:
                found = snapshot_download(model, revision=revision, allow_patterns=patterns)
            except IncompleteSnapshotError as error:
                # Perhaps of files that nobody reads; what is needed is looked for one by one.
                found = error.snapshot_path
        snapshot = Path(found)
        _fetch_single_file(model, snapshot)
        return cls(snapshot, model, snapshot.name, _read_folder(snapshot), hub_id=model)

    @contextmanager
    def open(
        self, names: Collection[str], dtype: torch.dtype | None = None
    ) -> Iterator[dict[str, Any]]:
        """Lazy tensors by name; only the files that hold one of `names` are opened.

        A tensor is read from the file when it is indexed (`tensor[...]`), not before.

        :param dtype: what the tensors will be converted to; those that have it already are mapped,
            others read, lest the file's pages be held beside their copies

        :raises ModelNotFoundError: if a file is missing or damaged
        """
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.weight_map[name]].append(name)
        with ExitStack() as stack:
            tensors = {}
            for file_name, held in by_file.items():
                try:
                    path = self._local(file_name)
                    file = stack.enter_context(safe_open(path, framework="pt"))
                    slices = {name: file.get_slice(name) for name in held}
                    if dtype is not None and _converts(slices, dtype):
                        file = stack.enter_context(_unmapped(path))
                        slices = {name: file.get_slice(name) for name in held}
                    tensors.update(slices)
                except (OSError, SafetensorError) as error:
                    raise ModelNotFoundError(
                        f"{self.folder / file_name}: can't read it ({error})"
                    ) from error
            yield tensors

    def _local(self, file_name: str) -> Path:
        path = self.folder / file_name
        if self.hub_id is None or path.exists():
            return path
        logger.info("fetching %s of %s", file_name, self.hub_id)
        with _hub_errors(self.hub_id, self.revision, file_name):
            return Path(hf_hub_download(self.hub_id, file_name, revision=self.revision))

    def files(self) -> list[Path]:
        """Its weight files that are here."""
        paths = (self.folder / name for name in set(self.weight_map.values()))
        return [path for path in paths if path.exists()]

    def layer_lists(self, num_layers: int) -> frozenset[str]:
        """Name prefixes that are followed by each number of `num_layers` layers and no other."""
        numbers: dict[str, set[int]] = defaultdict(set)
        for name in self.weight_map:
            if match := _FIRST_NUMBER.match(name):
                numbers[match[1]].add(int(match[2]))
        layers = set(range(num_layers))
        return frozenset(prefix for prefix, seen in numbers.items() if seen == layers)


def layer_of(name: str, layer_lists: Collection[str]) -> int | None:
    """The layer that the tensor `name` belongs to, or None if it is outside the layers."""
    match = _FIRST_NUMBER.match(name)
    return int(match[2]) if match and match[1] in layer_lists else None


def _fetch_single_file(model: str, snapshot: Path) -> None:
    """Fetch the weights of a Hub id if they are one file: every stage has to have all of it."""
    with _hub_errors(model, snapshot.name, SINGLE_FILE):
        try:
            hf_hub_download(model, SINGLE_FILE, revision=snapshot.name)
        except EntryNotFoundError:  # not at the Hub or, offline, not in the cache
            if not (snapshot / INDEX_FILE).exists():
                raise


def _read_folder(folder: Path) -> dict[str, str]:
    """See that a folder has all that a model needs; its tensors' files."""
    if not (folder / "config.json").exists():
        raise ModelNotFoundError(f"{folder} has no config.json; is it a model's folder?")
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ModelNotFoundError(
            f"{folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)})"
        )
    check_model_files(folder)
    if (folder / ADAPTER_FILE).exists():
        raise UnsupportedModelError(
            f"{folder} has an adapter ({ADAPTER_FILE}): merge it into the weights first, or remove "
            "that file to run them without it"
        )
    return _read_weight_map(folder, _weights_file(folder))


def _weights_file(folder: Path) -> Path:
    """The file that transformers takes the weights from, or their index.

    Its order (`_get_resolved_checkpoint_files`): what the config names, the single file, the index.
    """
    named = read_object(folder / "config.json").get("transformers_weights")
    if named is not None:
        path = folder / str(named)
        if not path.resolve().is_relative_to(folder.resolve()) or not path.exists():
            raise ModelNotFoundError(
                f"{folder} has no {named}, which 'transformers_weights' in config.json names"
            )
        return path
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists() and index.exists():
        logger.warning(
            "%s has both %s and %s: the weights are those of %s, as transformers has it",
            *(folder, SINGLE_FILE, INDEX_FILE, SINGLE_FILE),
        )
    for path in (single, index):
        if path.exists():
            return path
    other = next(iter([*folder.glob("*.bin"), *folder.glob("*.gguf")]), None)
    hint = f"; {other.name} must be converted first" if other else ""
    raise ModelNotFoundError(f"{folder} has no weights in {SINGLE_FILE} or {INDEX_FILE}{hint}")


def _read_weight_map(folder: Path, weights: Path) -> dict[str, str]:
    """The file of each tensor: as the files' own headers say, where the files are there."""
    if weights.suffix != ".json":
        return dict.fromkeys(_tensor_names(weights), weights.name)
    indexed = read_object(weights).get("weight_map")
    if not isinstance(indexed, dict) or not indexed:
        raise UnsupportedModelError(f"{weights}: 'weight_map' isn't an object of files by tensor")
    for name, file_name in indexed.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise UnsupportedModelError(
                f"{weights}: the file of {name!r} in 'weight_map' is {file_name!r}, not a name"
            )
    there = {name for name in set(indexed.values()) if (folder / name).exists()}
    # What the index says of a file that isn't there is all that is known of it: a stage that needs
    # it says so, or fetches it.
    weight_map = {name: file for name, file in indexed.items() if file not in there}
    for file_name in sorted(there):
        weight_map |= dict.fromkeys(_tensor_names(folder / file_name), file_name)
    return weight_map


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _converts(slices: dict[str, Any], dtype: torch.dtype) -> bool:
    stored = {_DTYPES.get(tensor.get_dtype()) for tensor in slices.values()}
    return bool(stored - {None, dtype})


def _unmapped(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", backend="pread")
    except TypeError:  # safetensors before 0.8 maps
        return safe_open(path, framework="pt")


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelNotFoundError(f"{path} can't be read ({brief(error)})") from error


def _content_hash(folder: Path, weight_map: dict[str, str]) -> str:
    """Hash of the small files and of evenly spread samples of each weight file: cheap and stable.

    Of the small files, for a tokenizer or a chat template decides about the text as weights do.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    small = {path for pattern in SMALL_FILES for path in folder.glob(pattern)}
    for path in sorted(small - {folder / "config.json", folder / INDEX_FILE}):
        try:
            digest.update(f"{path.name}:".encode() + path.read_bytes())
        except OSError as error:  # a folder in its place, or no right to read it
            raise ModelNotFoundError(f"{path} can't be read ({brief(error)})") from error
    for name in sorted(set(weight_map.values())):
        path = folder / name
        if not path.exists():
            continue  # A stage that needs it says so when it opens it.
        size = path.stat().st_size
        digest.update(f"{name}:{size}".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES_PER_FILE):
                file.seek(i * max(0, size - _SAMPLE_BYTES) // (_SAMPLES_PER_FILE - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]


@contextmanager
def _hub_errors(model: str, revision: str | None, file_name: str = "") -> Iterator[None]:
    """Turn the Hub's errors into ours.

    :param file_name: what is wanted, if it is one file
    """
    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFoundError(f"{model} is gated: accept its terms and log in first") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(f"neither a folder nor a Hub id: {model}") from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{model} has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        if file_name:
            raise ModelNotFoundError(
                f"{model}{at}: {file_name} isn't in the local cache, and the Hub can't be reached"
            ) from error
        raise ModelNotFoundError(
            f"{model}{at} is neither a folder nor in the local cache, and the Hub can't be reached"
        ) from error
    except EntryNotFoundError as error:
        raise ModelNotFoundError(f"{model}{at} has no {file_name or 'such file'}") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelNotFoundError(f"{model}{at}: the Hub answered {brief(error)}") from error
