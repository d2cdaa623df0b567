"""The Lua scripts of producers and of runs, each documented in its file; and how any are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import Any

import redis.asyncio as aredis
from redis.asyncio.client import Pipeline
from redis.exceptions import NoScriptError

__all__ = ["ScriptCall", "Scripts", "load_script", "load_scripts"]

_FOLDER = Path(__file__).parent

ScriptCall = tuple[str, Sequence[str], Sequence[str | bytes | int | float]]
"""(script name, KEYS, ARGV)"""


@cache
def load_script(name: str, folder: Path = _FOLDER) -> str:
    """The source of `<name>.lua`."""
    return (folder / f"{name}.lua").read_text(encoding="utf-8")


def load_scripts(folder: Path = _FOLDER) -> dict[str, str]:
    """The sources of all scripts in a folder, by name."""
    return {path.stem: load_script(path.stem, folder) for path in sorted(folder.glob("*.lua"))}


class Scripts:
    """Runs scripts by their hash, one by one or many in a pipeline.

    redis-py's own Script objects ask the server before every pipeline whether it knows them;
    here they are loaded again when the server says that it doesn't (it was restarted).

    :param sources: by name
    """

    def __init__(self, connection: aredis.Redis, sources: Mapping[str, str]) -> None:
        self._connection = connection
        self._sources = dict(sources)
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
