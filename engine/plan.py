"""Which layers run where: the partition, as planning makes it and stages carry it out."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PartitionPlan", "StageSpec"]


@dataclass(frozen=True)
class StageSpec:
    """One stage: a device and the layers `first_layer` up to, not including, `end_layer`."""

    index: int
    device: str
    first_layer: int
    end_layer: int
    is_first: bool
    """Owns the embedding."""
    is_last: bool
    """Owns the final norm and the head."""

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.first_layer


@dataclass(frozen=True)
class PartitionPlan:
    """All stages in order; together they hold every layer exactly once."""

    stages: tuple[StageSpec, ...]

    @property
    def num_layers(self) -> int:
        return self.stages[-1].end_layer

    def __str__(self) -> str:
        return ", ".join(f"{s.first_layer}-{s.end_layer - 1} on {s.device}" for s in self.stages)
