"""Which texts are drawn from what no request fixes, and what those draws follow from."""

from __future__ import annotations

from queue_api.wire.schemas import GenerationRequest, GenerationResult

__all__ = ["is_drawn", "seed_key_of"]


def is_drawn(request: GenerationRequest, result: GenerationResult | None = None) -> bool:
    """Whether the text may be another one when it is asked for by another run."""
    sampling = request.sampling
    if sampling.seed is not None:
        return False
    # the model's own sampling fields count where the request or the worker says so
    applied = result.applied_defaults or () if result is not None else ()
    return bool(sampling.temperature) or "temperature" in applied


def seed_key_of(result: GenerationResult) -> str:
    """What the draws of a run's request without a seed follow from, as its worker makes it."""
    return f"{result.run}/{result.id}"
