"""What producers import: wire models, client, datasets. Needs no torch.

from queue_api import Client, SyncClient
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from queue_api.client import Client
    from queue_api.datasets import run_dataset
    from queue_api.errors import BatchmillError
    from queue_api.run_handle import Run
    from queue_api.runs import RunStatus
    from queue_api.schemas import (
        ChatMessage,
        FinishReason,
        GenerationRequest,
        GenerationResult,
        SamplingParams,
    )
    from queue_api.settings import QueueSettings
    from queue_api.sync_client import SyncClient, SyncRun

__all__ = [
    "BatchmillError",
    "ChatMessage",
    "Client",
    "FinishReason",
    "GenerationRequest",
    "GenerationResult",
    "QueueSettings",
    "Run",
    "RunStatus",
    "SamplingParams",
    "SyncClient",
    "SyncRun",
    "run_dataset",
]

_HOMES = {
    "client": ["Client"],
    "datasets": ["run_dataset"],
    "errors": ["BatchmillError"],
    "run_handle": ["Run"],
    "runs": ["RunStatus"],
    "schemas": [
        "ChatMessage",
        "FinishReason",
        "GenerationRequest",
        "GenerationResult",
        "SamplingParams",
    ],
    "settings": ["QueueSettings"],
    "sync_client": ["SyncClient", "SyncRun"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import on first use: the engine takes only the wire models, and needs no redis for that."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
