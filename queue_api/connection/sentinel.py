"""Finds the Redis that Sentinel calls primary at present, for every new connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

import redis
import redis.asyncio as aredis
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelConnectionPool
from redis.asyncio.sentinel import SentinelManagedConnection as AsyncManagedConnection
from redis.asyncio.sentinel import SentinelManagedSSLConnection as AsyncManagedSSLConnection
from redis.connection import parse_url
from redis.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)

from queue_api.connection.failures import DEMOTED
from queue_api.connection.hiredis_packing import Packing
from queue_api.connection.role_changes import AsyncFollowing, Following

__all__ = ["AsyncSentinelPool", "SentinelAddress", "SentinelPool", "is_sentinel_url"]

SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
"""Each with the scheme of the servers behind it."""
DEFAULT_PORT = 26379
DEFAULT_SERVICE = "mymaster"
PREFIX = "sentinel_"
"""Options in the query that are for the Sentinels, not for the servers."""
ANSWER_WITHIN_S = 2.0
"""A Sentinel that takes longer is passed over for the next."""
LEAVE_ON = DEMOTED | {"NOREPLICAS"}
"""What a server says that has become a replica, or has none to write for."""


def is_sentinel_url(url: str) -> bool:
    """Whether the address is one of Sentinels."""
    return url.partition("://")[0].lower() in SCHEMES


@dataclass(frozen=True)
class SentinelAddress:
    """What a URL says: `redis+sentinel://user:password@host:26379,host:26379/service/0?option=x`.

    User and password are the servers'; the Sentinels' stand in the query as `sentinel_username`
    and `sentinel_password`. With `rediss+sentinel` servers and Sentinels both speak TLS. Every
    other option is one of redis-py's for the servers.
    """

    sentinels: tuple[tuple[str, int], ...]
    service: str
    is_tls: bool
    server_options: dict[str, Any]
    sentinel_options: dict[str, Any]

    @classmethod
    def parse(cls, url: str) -> SentinelAddress:
        """:raises ValueError: no host, or a port, database or option that can't be read"""
        hosts, parts = _without_hosts(url)
        user, _, hosts = hosts.rpartition("@")
        sentinels = tuple(_host_and_port(host) for host in hosts.split(","))
        service, _, database = parts.path.strip("/").partition("/")
        if database and not database.isdecimal():
            raise ValueError(f"the database, {database!r}, isn't a number")
        scheme = SCHEMES[parts.scheme]
        netloc = f"{user}@server" if user else "server"
        options = parse_url(  # type: ignore[no-untyped-call]
            urlunsplit((scheme, netloc, f"/{database}", parts.query, ""))
        )
        for ours in ("host", "port", "connection_class"):
            options.pop(ours, None)
        for_sentinels = {
            name.removeprefix(PREFIX): options.pop(name)
            for name in list(options)
            if name.startswith(PREFIX)
        }
        if scheme == "rediss":
            tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
            for_sentinels |= {"ssl": True, **tls}
        return cls(
            sentinels, service or DEFAULT_SERVICE, scheme == "rediss", options, for_sentinels
        )

    def ask(self) -> dict[str, Any]:
        """Options of the Sentinels' clients: the next one is asked soon, and none twice."""
        return {
            "socket_timeout": ANSWER_WITHIN_S,
            "socket_connect_timeout": ANSWER_WITHIN_S,
            "protocol": 2,
            **self.sentinel_options,
        }


def _without_hosts(url: str) -> tuple[str, SplitResult]:
    """What stands between `//` and the path, and the rest: Python's own splitter knows one host,
    and some versions of it refuse a list with an IPv6 address behind others."""
    scheme, _, rest = url.partition("://")
    end = min((place for place in map(rest.find, "/?#") if place >= 0), default=len(rest))
    return rest[:end], urlsplit(f"{scheme}://{rest[end:]}")


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a Sentinel without a host")
    return parts.hostname, parts.port or DEFAULT_PORT


class _Managed(Following, SentinelManagedConnection):
    """A new connection asks the Sentinels again."""

    leave_on = LEAVE_ON


class _ManagedSSL(_Managed, SentinelManagedSSLConnection):
    """The same over TLS."""


class _AsyncManaged(Packing, AsyncFollowing, AsyncManagedConnection):
    """The same for asyncio."""

    leave_on = LEAVE_ON


class _AsyncManagedSSL(_AsyncManaged, AsyncManagedSSLConnection):
    """The same for asyncio over TLS."""


class SentinelPool(SentinelConnectionPool, redis.BlockingConnectionPool):
    """Connections to the primary, bounded; callers wait for one."""

    def __init__(self, address: SentinelAddress, **options: Any) -> None:
        no_retry = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        asked = Sentinel(address.sentinels, sentinel_kwargs={**address.ask(), "retry": no_retry})  # type: ignore[no-untyped-call]
        managed = _ManagedSSL if address.is_tls else _Managed
        super().__init__(  # type: ignore[no-untyped-call]
            address.service,
            asked,
            connection_class=managed,
            **{**options, **address.server_options},
        )


class AsyncSentinelPool(AsyncSentinelConnectionPool, aredis.BlockingConnectionPool):
    """The same for asyncio."""

    def __init__(self, address: SentinelAddress, **options: Any) -> None:
        no_retry = redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 0)
        asked = AsyncSentinel(  # type: ignore[no-untyped-call]
            list(address.sentinels), sentinel_kwargs={**address.ask(), "retry": no_retry}
        )
        managed = _AsyncManagedSSL if address.is_tls else _AsyncManaged
        super().__init__(  # type: ignore[no-untyped-call]
            address.service,
            asked,
            connection_class=managed,
            **{**options, **address.server_options},
        )
