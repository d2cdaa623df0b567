"""Workers that are started together, and what is said when they can't run."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from batchmill.offline.local_workers import LocalCluster
from queue_api.wire.errors import ConfigurationError


def test_workers_that_all_refuse_their_settings_are_one_error() -> None:
    heard: list[dict[str, Any]] = []

    async def start() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
        async with LocalCluster(3, {}, arguments=["--no-such-option"]) as cluster:
            with pytest.raises(ConfigurationError):
                await cluster.watch()
            while cluster.pids:  # noqa: ASYNC110 - processes tell nobody but the cluster
                await asyncio.sleep(0.01)
            for _ in range(10):  # until those who wait for the processes have looked
                await asyncio.sleep(0)
        del cluster
        gc.collect()

    asyncio.run(start())
    assert heard == []
