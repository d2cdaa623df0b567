"""Connections that write commands with hiredis.

redis-py does so in its plain connections; those of asyncio pack each argument in Python, which
took a sixth of a busy worker's time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import hiredis
import redis
import redis.asyncio as aredis
from redis.asyncio.connection import AbstractConnection

from queue_api.connection.role_changes import AsyncFollowing

__all__ = ["Packing", "PackingPool"]


class Packing(AbstractConnection):
    """To be mixed into a connection class of redis.asyncio, before it."""

    def pack_command(self, *args: Any) -> list[bytes]:
        """:raises redis.DataError: an argument that is no text, bytes or number"""
        # a command's name may hold its first arguments, as "SCRIPT LOAD" does
        name, *rest = args
        words = name.encode().split() if isinstance(name, str) else name.split()
        try:
            return [hiredis.pack_command((*words, *rest))]
        except TypeError as error:
            raise redis.DataError(str(error)) from None

    def pack_commands(self, commands: Iterable[Iterable[Any]]) -> list[bytes]:
        """The same for many."""
        return [packed for command in commands for packed in self.pack_command(*command)]


class PackingPool(aredis.BlockingConnectionPool):
    """A bounded pool of such connections, which leave a replica, whatever they are otherwise."""

    def __init__(
        self, *, connection_class: type[AbstractConnection] = aredis.Connection, **options: Any
    ) -> None:
        bases = (Packing, AsyncFollowing, connection_class)
        super().__init__(
            connection_class=type(f"Packing{connection_class.__name__}", bases, {}), **options
        )
