"""The keyword arguments that editors complete are the fields that requests take."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from queue_api.client.client import Client
from queue_api.client.sync_client import SyncClient
from queue_api.wire.request_fields import RequestFields
from queue_api.wire.sampling import SAMPLING_FIELDS
from queue_api.wire.sampling_fields import SamplingFields
from queue_api.wire.schemas import GenerationRequest


def test_the_keyword_arguments_are_the_sampling_fields() -> None:
    assert set(SamplingFields.__annotations__) == SAMPLING_FIELDS


@pytest.mark.parametrize("kind", [Client, SyncClient])
def test_generate_takes_every_field_of_a_request_by_name(kind: Any) -> None:
    own = set(inspect.signature(kind.generate).parameters) - {"self", "timeout", "fields"}
    others = set(RequestFields.__annotations__)
    assert own.isdisjoint(others)
    assert own | others == SAMPLING_FIELDS | GenerationRequest.model_fields.keys()
