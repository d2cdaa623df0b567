"""The sampling fields that editors complete are those that requests take."""

from __future__ import annotations

from queue_api.wire.sampling import SAMPLING_FIELDS
from queue_api.wire.sampling_fields import SamplingFields


def test_the_keyword_arguments_are_the_sampling_fields() -> None:
    assert set(SamplingFields.__annotations__) == SAMPLING_FIELDS
