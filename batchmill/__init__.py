"""Batch text generation: prompts on a Redis queue, a partitioned engine in every worker.

    from batchmill import Client, SyncClient, SamplingParams

This is all of the API; nothing of it needs torch. The tree of errors stands in
`queue_api/wire/errors.py`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from queue_api.client.client import Client
    from queue_api.client.run import Run
    from queue_api.client.sync_client import (
        SyncClient,
        SyncRun,
    )
    from queue_api.connection.embedded import EmbeddedRedis
    from queue_api.connection.settings import QueueSettings
    from queue_api.datasets.formats.output_options import OutputOptions
    from queue_api.datasets.layout.layout import Layout
    from queue_api.datasets.row_selection import RowSelection
    from queue_api.datasets.run import run_dataset
    from queue_api.datasets.summary import (
        Progress,
        RunSummary,
    )
    from queue_api.store.runs import RunStatus
    from queue_api.wire.errors import (
        BatchmillError,
        ClientClosedError,
        ConfigurationError,
        DatasetError,
        DuplicateRequestError,
        EngineError,
        GenerationFailedError,
        InvalidRequestError,
        JobKeyTakenError,
        MaxTokensTooLargeError,
        MissingExtraError,
        ModelNotFoundError,
        PartitionError,
        PromptTooLongError,
        QueueFullError,
        RedisAccessError,
        RedisAuthError,
        RedisServerError,
        RedisUnavailableError,
        RequestError,
        RequestOutOfMemoryError,
        RequestTooLargeError,
        RowsFailedError,
        RunIncompleteError,
        RunNotFoundError,
        UnsupportedModelError,
        UnsupportedRequestError,
        WrongOwnerError,
    )
    from queue_api.wire.request_fields import RequestFields
    from queue_api.wire.sampling import SamplingParams
    from queue_api.wire.sampling_fields import SamplingFields
    from queue_api.wire.schemas import (
        ChatMessage,
        CompletionOutput,
        ErrorDetail,
        FinishReason,
        GenerationRequest,
        GenerationResult,
        JobTimings,
        StructuredOutputStatus,
        TokenLogprob,
        TokenLogprobs,
    )
    from queue_api.wire.structured_outputs import StructuredOutputs

__all__ = [
    "BatchmillError",
    "ChatMessage",
    "Client",
    "ClientClosedError",
    "CompletionOutput",
    "ConfigurationError",
    "DatasetError",
    "DuplicateRequestError",
    "EmbeddedRedis",
    "EngineError",
    "ErrorDetail",
    "FinishReason",
    "GenerationFailedError",
    "GenerationRequest",
    "GenerationResult",
    "InvalidRequestError",
    "JobKeyTakenError",
    "JobTimings",
    "Layout",
    "MaxTokensTooLargeError",
    "MissingExtraError",
    "ModelNotFoundError",
    "OutputOptions",
    "PartitionError",
    "Progress",
    "PromptTooLongError",
    "QueueFullError",
    "QueueSettings",
    "RedisAccessError",
    "RedisAuthError",
    "RedisServerError",
    "RedisUnavailableError",
    "RequestError",
    "RequestFields",
    "RequestOutOfMemoryError",
    "RequestTooLargeError",
    "RowSelection",
    "RowsFailedError",
    "Run",
    "RunIncompleteError",
    "RunNotFoundError",
    "RunStatus",
    "RunSummary",
    "SamplingFields",
    "SamplingParams",
    "StructuredOutputStatus",
    "StructuredOutputs",
    "SyncClient",
    "SyncRun",
    "TokenLogprob",
    "TokenLogprobs",
    "UnsupportedModelError",
    "UnsupportedRequestError",
    "WrongOwnerError",
    "run_dataset",
]

_HOMES = {
    "queue_api.client.client": ["Client"],
    "queue_api.client.run": ["Run"],
    "queue_api.client.sync_client": ["SyncClient", "SyncRun"],
    "queue_api.connection.embedded": ["EmbeddedRedis"],
    "queue_api.connection.settings": ["QueueSettings"],
    "queue_api.datasets.formats.output_options": ["OutputOptions"],
    "queue_api.datasets.layout.layout": ["Layout"],
    "queue_api.datasets.row_selection": ["RowSelection"],
    "queue_api.datasets.run": ["run_dataset"],
    "queue_api.datasets.summary": ["Progress", "RunSummary"],
    "queue_api.store.runs": ["RunStatus"],
    "queue_api.wire.errors": [
        "BatchmillError",
        "ClientClosedError",
        "ConfigurationError",
        "DatasetError",
        "DuplicateRequestError",
        "EngineError",
        "GenerationFailedError",
        "InvalidRequestError",
        "JobKeyTakenError",
        "MaxTokensTooLargeError",
        "MissingExtraError",
        "ModelNotFoundError",
        "PartitionError",
        "PromptTooLongError",
        "QueueFullError",
        "RedisAccessError",
        "RedisAuthError",
        "RedisServerError",
        "RedisUnavailableError",
        "RequestError",
        "RequestOutOfMemoryError",
        "RequestTooLargeError",
        "RowsFailedError",
        "RunIncompleteError",
        "RunNotFoundError",
        "UnsupportedModelError",
        "UnsupportedRequestError",
        "WrongOwnerError",
    ],
    "queue_api.wire.sampling": ["SamplingParams"],
    "queue_api.wire.request_fields": ["RequestFields"],
    "queue_api.wire.sampling_fields": ["SamplingFields"],
    "queue_api.wire.schemas": [
        "ChatMessage",
        "CompletionOutput",
        "ErrorDetail",
        "FinishReason",
        "GenerationRequest",
        "GenerationResult",
        "JobTimings",
        "StructuredOutputStatus",
        "TokenLogprob",
        "TokenLogprobs",
    ],
    "queue_api.wire.structured_outputs": ["StructuredOutputs"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import on first use: the command starts without what it doesn't need."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
