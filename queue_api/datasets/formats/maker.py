"""Maker: the model that made a row."""

from __future__ import annotations

from dataclasses import dataclass

from queue_api.wire.schemas import GenerationResult

__all__ = ["Maker"]


@dataclass(frozen=True, eq=False, order=False)
class Maker:
    """A model; false for none, as of a row that was refused before a model saw it.

    The same revision under another name is the same model: its folder was moved.
    """

    model: str = ""
    revision: str = ""

    @classmethod
    def of(cls, result: GenerationResult) -> Maker:
        """Who made a result."""
        return cls(result.model, result.model_revision or "") if result.model else cls()

    def __bool__(self) -> bool:
        return bool(self.model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Maker) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __str__(self) -> str:
        return f"{self.model} at revision {self.revision}" if self.revision else self.model

    @property
    def _key(self) -> str:
        return self.revision or self.model
