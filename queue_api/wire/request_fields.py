"""RequestFields: what `generate` takes besides its own keyword arguments, for editors to complete.

What they mean and which values they take is `GenerationRequest`'s business; a test holds the names
of the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from queue_api.wire.sampling import SamplingParams
from queue_api.wire.sampling_fields import SamplingFields

__all__ = ["RequestFields"]


class RequestFields(SamplingFields, total=False):
    """Sampling fields, flat or in a `sampling` of their own, and those of a request."""

    sampling: SamplingParams | Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    continue_final_message: bool
    timeout_s: float | None
    deadline: float | None
