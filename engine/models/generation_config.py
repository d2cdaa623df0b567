"""What a checkpoint says of how its texts are made: generation_config.json, else config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from engine.models.checkpoint import Checkpoint
from queue_api.wire.errors import UnsupportedModelError

__all__ = ["ModelGeneration", "end_of_text_ids"]

_FILE = "generation_config.json"


@dataclass(frozen=True)
class ModelGeneration:
    """A checkpoint's `GenerationConfig`, as `transformers.generate` would begin with it."""

    config: GenerationConfig
    source: str
    """The file that it is from, for messages."""

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> ModelGeneration:
        """Read it.

        Fields that older models keep in config.json count where there is no other file, as in
        transformers.

        :raises UnsupportedModelError: naming the file, if transformers can't make sense of it
        """
        has_file = (checkpoint.folder / _FILE).exists()
        source = _FILE if has_file else "config.json"
        kwargs: dict[str, Any] = {} if has_file else {"_from_model_config": True}
        try:
            config = GenerationConfig.from_pretrained(
                checkpoint.folder, config_file_name=source, local_files_only=True, **kwargs
            )
        except Exception as error:  # transformers raises all sorts
            said = " ".join(str(error).split())[:300]
            raise UnsupportedModelError(f"{checkpoint.folder / source}: {said}") from error
        return cls(config, source)

    def named(self) -> dict[str, Any]:
        """The fields that the file gives another value than none at all, by name."""
        known = GenerationConfig().to_dict()
        return {
            name: value
            for name, value in vars(self.config).items()
            if name in known and value is not None
        }


def end_of_text_ids(value: object, where: str) -> frozenset[int]:
    """The token ids that `eos_token_id` names.

    :raises UnsupportedModelError: for anything but an integer or a list of them
    """
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise UnsupportedModelError(
                f"{where}: 'eos_token_id' is {value!r:.60}; it must be a token id or a list of them"
            )
    return frozenset(ids)
