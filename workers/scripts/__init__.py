"""The Lua scripts of the worker, each documented in its own file."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from pathlib import Path
from typing import Any

import redis.asyncio as aredis
from redis.asyncio.client import Pipeline
from redis.exceptions import NoScriptError

from queue_api.scripts import load_script

__all__ = ["ScriptCall", "Scripts", "load_worker_script"]

_NAMES = ("abandon", "checkpoint", "claim", "finish", "heartbeat", "reclaim", "release")
ScriptCall = tuple[str, Sequence[str], Sequence[str | bytes | int | float]]
"""(script name, KEYS, ARGV)"""


def load_worker_script(name: str) -> str:
    """The source of `<name>.lua` of this folder."""
    return load_script(name, Path(__file__).parent)


class Scripts:
    """Runs the scripts by their hash, one by one or many in a pipeline.

    redis-py's own Script objects ask the server before every pipeline whether it knows them;
    here they are loaded again when the server says that it doesn't (it was restarted).
    """

    def __init__(self, connection: aredis.Redis) -> None:
        self._connection = connection
        self._sources = {name: load_worker_script(name) for name in _NAMES}
        self._sources["emit"] = load_script("emit")
        self._hashes = {
            name: sha1(source.encode(), usedforsecurity=False).hexdigest()
            for name, source in self._sources.items()
        }

    async def load(self) -> None:
        """Make the server know all scripts."""
        pipeline = self._connection.pipeline(transaction=False)
        for source in self._sources.values():
            pipeline.script_load(source)
        await pipeline.execute()

    async def call(self, call: ScriptCall) -> Any:
        """Run one script."""
        try:
            return await self._evaluate(self._connection, call)
        except NoScriptError:
            await self.load()
            return await self._evaluate(self._connection, call)

    async def call_many(self, calls: Sequence[ScriptCall]) -> list[Any]:
        """Run scripts in one round trip; what one of them raised stands in place of its reply."""
        replies = await self._pipelined(calls)
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            await self.load()
            again = await self._pipelined([calls[i] for i in unknown])
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        return replies

    async def _pipelined(self, calls: Sequence[ScriptCall]) -> list[Any]:
        pipeline = self._connection.pipeline(transaction=False)
        for call in calls:
            self._evaluate(pipeline, call)
        return await pipeline.execute(raise_on_error=False)

    def _evaluate(self, client: aredis.Redis | Pipeline, call: ScriptCall) -> Any:
        name, keys, args = call
        return client.evalsha(self._hashes[name], len(keys), *keys, *args)
