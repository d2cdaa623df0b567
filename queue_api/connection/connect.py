"""How batchmill talks to Redis: opening a connection, and checking the server behind it.

redis-py 8 has defaults that bite here: a read may take no longer than 5 s, plain pools raise
beyond 100 connections, replies change shape with RESP3. One place sets them right and keeps
what the URL says about TLS, user, password, database and unix socket.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any, cast

import redis
import redis.asyncio as aredis

from queue_api.connection.address import check_url, safe_url, why_unreadable
from queue_api.connection.hiredis_packing import PackingPool
from queue_api.connection.role_changes import FollowingPool
from queue_api.connection.sentinel import (
    AsyncSentinelPool,
    SentinelAddress,
    SentinelPool,
    is_sentinel_url,
)
from queue_api.wire.errors import (
    ConfigurationError,
    RedisServerError,
)

__all__ = [
    "LONGEST_BLOCK_S",
    "SOCKET_TIMEOUT_S",
    "ServerInfo",
    "check_server",
    "connect",
    "connect_async",
]

SOCKET_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
LONGEST_BLOCK_S = 20.0
"""The longest that a blocking command (XREAD, BLPOP) may wait; well below SOCKET_TIMEOUT_S."""
MINIMUM_VERSION = (6, 2)
CLOCK_TOLERANCE_S = 5.0

_OPTIONS: dict[str, Any] = {
    "protocol": 2,
    "health_check_interval": 30,
}


def connect(
    url: str, max_connections: int = 16, timeout_s: float = SOCKET_TIMEOUT_S
) -> redis.Redis:
    """A client with a bounded pool whose callers wait for a connection instead of failing.

    :param timeout_s: how long a command may go without an answer
    :raises ConfigurationError: the URL can't be read
    """
    pool: redis.BlockingConnectionPool
    try:
        check_url(url)
        bounds = {"max_connections": max_connections, "timeout": SOCKET_TIMEOUT_S}
        if is_sentinel_url(url):
            pool = SentinelPool(SentinelAddress.parse(url), **bounds, **_for_scheme(url, timeout_s))
        else:
            pool = FollowingPool.from_url(url, **bounds, **_for_scheme(url, timeout_s))
    except ValueError as error:
        raise _bad_url(url, error) from None
    return redis.Redis.from_pool(pool)


def connect_async(
    url: str, max_connections: int = 16, timeout_s: float = SOCKET_TIMEOUT_S
) -> aredis.Redis:
    """The same for asyncio.

    :raises ConfigurationError: the URL can't be read
    """
    pool: aredis.BlockingConnectionPool
    try:
        check_url(url)
        bounds = {"max_connections": max_connections, "timeout": SOCKET_TIMEOUT_S}
        if is_sentinel_url(url):
            pool = AsyncSentinelPool(
                SentinelAddress.parse(url), **bounds, **_for_scheme(url, timeout_s)
            )
        else:
            pool = PackingPool.from_url(url, **bounds, **_for_scheme(url, timeout_s))
    except ValueError as error:
        raise _bad_url(url, error) from None
    return aredis.Redis.from_pool(pool)


def _for_scheme(url: str, timeout_s: float) -> dict[str, Any]:
    timeouts = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": min(CONNECT_TIMEOUT_S, timeout_s),
    }
    keepalive = {} if url.startswith("unix://") else {"socket_keepalive": True}
    return {**_OPTIONS, **timeouts, **keepalive}


def _bad_url(url: str, error: ValueError) -> ConfigurationError:
    return ConfigurationError(
        f"{safe_url(url)!r} isn't a Redis URL ({why_unreadable(error)}); use something like "
        "redis://localhost:6379/0, rediss://user:password@host:6380, unix:///run/redis.sock or "
        "redis+sentinel://host:26379,host:26379/mymaster/0"
    )


@dataclass(frozen=True)
class ServerInfo:
    """What check_server found out."""

    version: tuple[int, int, int]
    kind: str
    """`redis` or `valkey`."""
    persistence: str
    """One line: what survives a restart of the server."""
    clock_offset_s: float
    """The server's clock minus ours."""

    def warnings(self) -> list[str]:
        """What isn't wrong enough to stop, but should be known."""
        found = []
        if not self.persistence.startswith("AOF on"):
            found.append(f"a crash of Redis may lose queued work: {self.persistence}")
        if abs(self.clock_offset_s) > CLOCK_TOLERANCE_S:
            found.append(
                f"the clock of Redis differs from ours by {self.clock_offset_s:+.1f} s; "
                "leases and queue times are off by as much"
            )
        return found


def check_server(connection: redis.Redis) -> ServerInfo:
    """Make sure that work put into this server stays there.

    :raises RedisServerError: too old, in a Cluster, a replica, or it may evict keys
    :raises redis.RedisError: it can't be asked; see `friendly`
    """
    asked_at = time.time()
    info = connection.info()
    # redis-py reads a version like 7.2.4 as text, but one like 7.2 as a float
    numbers = [int(part) for part in re.findall(r"\d+", str(info["redis_version"]))[:3]]
    version = cast("tuple[int, int, int]", tuple([*numbers, 0, 0][:3]))
    if version < MINIMUM_VERSION:
        raise RedisServerError(
            f"Redis {info['redis_version']} is too old; batchmill needs 6.2 or newer"
        )
    if info.get("cluster_enabled"):
        raise RedisServerError(
            "this Redis is part of a Cluster, over which RQ's keys would be scattered; use a "
            "single primary, by itself or with Sentinel"
        )
    if info.get("role", "master") != "master":
        raise RedisServerError("this Redis is a read-only replica; use its primary's address")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise RedisServerError(
            f"Redis has maxmemory-policy {policy!r}, which may delete queued work; "
            "run: redis-cli CONFIG SET maxmemory-policy noeviction"
        )
    seconds, micros = connection.time()
    clock_offset_s = seconds + micros / 1e6 - (asked_at + time.time()) / 2
    kind = "valkey" if info.get("server_name") == "valkey" else "redis"
    return ServerInfo(version, kind, _persistence(info), clock_offset_s)


def _persistence(info: dict[str, Any]) -> str:
    if info.get("aof_enabled"):
        status = info.get("aof_last_write_status", "ok")
        return "AOF on" if status == "ok" else f"AOF on, but its last write ended with {status!r}"
    unsaved = info.get("rdb_changes_since_last_save", 0)
    return f"AOF off; {unsaved} changes since the last snapshot"
