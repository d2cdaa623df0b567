"""Connections that leave a server which has become a replica.

The address may lead to another one by then (a name in DNS, a proxy, Sentinel), but a connection
that is kept would write to the replica for ever.
"""

from __future__ import annotations

from typing import Any

import redis
import redis.connection
from redis.asyncio.connection import AbstractConnection as AsyncAbstractConnection

from queue_api.connection.failures import DEMOTED, error_code

__all__ = ["AsyncFollowing", "Following", "FollowingPool"]


class Following(redis.connection.AbstractConnection):
    """To be mixed into a connection class, before it: takes such words for a lost connection.

    So callers try again, on a new one.
    """

    leave_on = DEMOTED
    """Codes of what a server says that isn't the one to write to, or not any more."""

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """:raises redis.ConnectionError: it has become a replica; the code stands first"""
        try:
            return super().read_response(*args, **kwargs)
        except redis.ResponseError as error:
            if error_code(error) not in self.leave_on:
                raise
            self.disconnect()  # type: ignore[no-untyped-call]
            raise _lost(error) from None


class AsyncFollowing(AsyncAbstractConnection):
    """The same for asyncio."""

    leave_on = DEMOTED

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """:raises redis.ConnectionError: as above"""
        try:
            return await super().read_response(*args, **kwargs)
        except redis.ResponseError as error:
            if error_code(error) not in self.leave_on:
                raise
            await self.disconnect()
            raise _lost(error) from None


class FollowingPool(redis.BlockingConnectionPool):
    """A bounded pool of such connections, whatever they are otherwise."""

    def __init__(
        self,
        *,
        connection_class: type[redis.connection.AbstractConnection] = redis.Connection,
        **options: Any,
    ) -> None:
        following = type(f"Following{connection_class.__name__}", (Following, connection_class), {})
        super().__init__(connection_class=following, **options)  # type: ignore[no-untyped-call]


def _lost(error: redis.ResponseError) -> redis.ConnectionError:
    code, said = error_code(error), str(error)
    return redis.ConnectionError(said if said.startswith(code) else f"{code} {said}")
