"""What it means when Redis doesn't do as it was told: the one place that reads its errors.

Worker, client, dataset run and RQ's handlers ask here whether the same command may work later
(`PASSING`), never will (`FATAL`), or fails because of one key alone (`KEY`). Redis 6.2 wraps what
is raised inside a script (`ERR Error running script …: -NOREPLICAS …`); later servers name the
code first. Both are read the same way.
"""

from __future__ import annotations

import re
from enum import Enum

import redis

from queue_api.connection.address import safe_url
from queue_api.wire.errors import (
    RedisAccessError,
    RedisAuthError,
    RedisServerError,
    RedisUnavailableError,
)

__all__ = ["REDIS_ERRORS", "Failure", "error_code", "failure_of", "friendly", "is_passing"]

REDIS_ERRORS = (redis.RedisError, OSError)
"""All that a command may raise; `failure_of` tells what it means."""


class Failure(Enum):
    """What whoever sent the command should do."""

    PASSING = "keep everything and send the same again"
    KEY = "give up this one key: somebody put something else there"
    FATAL = "tell it and stop: it will not work by itself"


_CODES: tuple[tuple[type[Exception], str], ...] = (
    # redis-py takes these words off the message
    (redis.exceptions.BusyLoadingError, "LOADING"),
    (redis.exceptions.ReadOnlyError, "READONLY"),
    (redis.exceptions.OutOfMemoryError, "OOM"),
    (redis.exceptions.NoPermissionError, "NOPERM"),
    (redis.exceptions.NoScriptError, "NOSCRIPT"),
    (redis.exceptions.MasterDownError, "MASTERDOWN"),  # to redis-py it is a ClusterDownError
    (redis.exceptions.ClusterDownError, "CLUSTERDOWN"),
    (redis.exceptions.TryAgainError, "TRYAGAIN"),
    (redis.exceptions.ExecAbortError, "EXECABORT"),
    (redis.exceptions.AuthenticationError, "NOAUTH"),
    (redis.exceptions.AuthorizationError, "NOAUTH"),
)
_MAY_PASS = frozenset(
    (
        *("BUSY", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS"),
        *("NOSCRIPT", "OOM", "READONLY", "TRYAGAIN", "UNBLOCKED"),
    )
)
_NEVER_PASS = frozenset(
    (
        *("ASK", "CLUSTERDOWN", "CROSSSLOT", "EXECABORT", "MOVED"),
        *("NOAUTH", "NOPERM", "NOPROTO", "WRONGPASS"),
    )
)
# Inside a script: at the end of what 6.2 wraps, the code stands behind a dash.
_CODE = re.compile(r"^-?([A-Z]{3,})\b")
_WRAPPED = re.compile(r"(?:^|[\s:])-([A-Z]{3,}) ")


def error_code(error: BaseException) -> str:
    """The first word of what the server said, such as OOM or WRONGTYPE; ERR if it named none."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    said = str(error)
    first = _CODE.match(said)
    if first is not None and first[1] != "ERR":
        return first[1]
    wrapped = _WRAPPED.search(said)
    return wrapped[1] if wrapped is not None else "ERR"


def failure_of(error: BaseException) -> Failure:
    """How to take it.

    :param error: what redis-py raised, or put in place of a reply
    """
    code = error_code(error)
    if code in _MAY_PASS:
        return Failure.PASSING
    if code in _NEVER_PASS:
        return Failure.FATAL
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        return Failure.PASSING
    if isinstance(error, redis.ResponseError) and "unknown command" not in str(error).lower():
        return Failure.KEY
    return Failure.FATAL


def is_passing(error: object) -> bool:
    """True for an error after which the same command may work; False for what is none."""
    return isinstance(error, REDIS_ERRORS) and failure_of(error) is Failure.PASSING


def friendly(error: Exception, url: str) -> RedisAccessError:
    """One of our errors, in clear words, for what redis-py raised; raise it `from None`."""
    address = safe_url(url)
    detail = str(error).rstrip(".")
    code = error_code(error)
    if code in {"NOAUTH", "WRONGPASS"}:
        return RedisAuthError(
            f"Redis at {address} refused the user or password ({detail}); set REDIS_URL to "
            "redis://user:password@host:port/db"
        )
    if code == "NOPERM":
        return RedisAuthError(
            f"Redis at {address}: the user may not run a command we need ({detail}); "
            "give it the ACL line of docs/redis.md"
        )
    if code == "OOM":
        return RedisServerError(
            f"Redis at {address} is out of memory ({detail}); raise its maxmemory or trim old runs"
        )
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError) or code in {
        "LOADING",
        "READONLY",
    }:
        return RedisUnavailableError(
            f"no Redis answers at {address} ({detail}); start one, or set REDIS_URL or --redis-url"
        )
    return RedisServerError(f"Redis at {address}: {detail}")
