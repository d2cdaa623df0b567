"""What it means when Redis doesn't do as it was told: the one place that reads its errors.

Worker, client, dataset run and RQ's handlers ask here whether the same command may work later
(`PASSING`), never will (`FATAL`), or fails because of one key alone (`KEY`). Redis 6.2 wraps what
is raised inside a script (`ERR Error running script …: -NOREPLICAS …`); later servers name the
code first. Both are read the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum

import redis

from queue_api.connection.address import safe_url
from queue_api.wire.errors import (
    RedisAccessError,
    RedisAuthError,
    RedisServerError,
    RedisUnavailableError,
)

__all__ = [
    "DEMOTED",
    "REDIS_ERRORS",
    "Failure",
    "error_code",
    "failure_of",
    "friendly",
    "is_answer",
    "is_passing",
    "raise_unless_key",
]

REDIS_ERRORS = (redis.RedisError, OSError)
"""All that a command may raise; `failure_of` tells what it means."""


DEMOTED = frozenset({"READONLY", "MASTERDOWN", "UNBLOCKED"})
"""What a server says that is a replica, or has just become one."""


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
_CODE = re.compile(r"^-?([A-Z]{3,})\b")
# Behind what is put in front of it: by redis-py in a pipeline, by Redis in EXEC, and by 6.2 in a
# script, where the code stands behind a dash or at the end of the places that it came through.
_PIPELINE = " of pipeline caused error: "
_WRAPPED = re.compile(r"(?:^|[\s:])-([A-Z]{3,}) |because of: ([A-Z]{3,}) |: ([A-Z]{3,}) ")
_IN_SCRIPT = "Error running script", "Transaction discarded"
# Servers name no code where a script does what the user may not.
_DENIED = "The user executing the script can't", "ACL failure in script"
_KILLED = "Script killed by user"


def error_code(error: BaseException) -> str:
    """The first word of what the server said, such as OOM or WRONGTYPE; ERR if it named none."""
    # that of asyncio shows the tuple of the error's arguments
    said = str(error).rpartition(_PIPELINE)[2].lstrip("('\"")
    known = next((code for kind, code in _CODES if isinstance(error, kind)), None)
    if known is not None and known != "EXECABORT":
        return known
    first = _CODE.match(said)
    if first is not None and first[1] not in ("ERR", "ACL"):
        return first[1]
    if any(words in said for words in _DENIED):
        return "NOPERM"
    if _KILLED in said:
        return "BUSY"  # by whoever found that it took too long
    wrapped = _WRAPPED.search(said) if said.startswith(_IN_SCRIPT) else None
    found = next(filter(None, wrapped.groups()), None) if wrapped is not None else None
    return found or known or "ERR"


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


def is_answer(error: BaseException) -> bool:
    """True if a server said so: one is there, even if it can't do what it was told."""
    return error_code(error) != "ERR" or isinstance(error, redis.ResponseError)


def raise_unless_key(replies: Iterable[object]) -> None:
    """Raise the first error among replies of a pipeline that isn't about one key alone."""
    for reply in replies:
        if isinstance(reply, Exception) and failure_of(reply) is not Failure.KEY:
            raise reply


def is_passing(error: object) -> bool:
    """True for an error after which the same command may work; False for what is none."""
    return isinstance(error, REDIS_ERRORS) and failure_of(error) is Failure.PASSING


def friendly(error: Exception, url: str) -> RedisAccessError:
    """One of our errors, in clear words, for what redis-py raised; raise it `from None`."""
    told = _told(error, safe_url(url))
    told.may_pass = is_passing(error)
    return told


def _told(error: Exception, address: str) -> RedisAccessError:
    detail = str(error).rstrip(".")
    code = error_code(error)
    if code in {"NOAUTH", "WRONGPASS"}:
        return RedisAuthError(
            f"Redis at {address} refused the user or password ({detail}); set "
            "BATCHMILL_REDIS_URL to redis://user:password@host:port/db"
        )
    if code == "NOPERM":
        return RedisAuthError(
            f"Redis at {address}: the user may not run a command we need ({detail}); "
            "give it its ACL line of docs/redis.md"
        )
    if code in _ADVICE:
        return RedisServerError(f"Redis at {address} {_ADVICE[code].format(detail=detail)}")
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        return RedisUnavailableError(
            f"no Redis answers at {address} ({detail}); start one, or set "
            "BATCHMILL_REDIS_URL or --redis-url"
        )
    return RedisServerError(f"Redis at {address}: {detail}")


_ADVICE = {
    "OOM": "is out of memory ({detail}); raise its maxmemory or trim old runs",
    "READONLY": "is a read-only replica ({detail}); use its primary's address, or its Sentinels'",
    "MASTERDOWN": "is a replica without its primary ({detail}); use the primary's address, or the "
    "Sentinels'",
    "LOADING": "is still loading its data ({detail}); try again later",
    "BUSY": "is held up by a script ({detail}); try again later",
    "NOREPLICAS": "takes no writes without its replicas ({detail}); see its min-replicas-to-write",
    "MISCONF": "takes no writes because it can't write to its disk ({detail}); see its log",
    "CLUSTERDOWN": "is part of a Cluster ({detail}); RQ's keys need a single primary, by itself or "
    "with Sentinel",
    "MOVED": "is part of a Cluster ({detail}); RQ's keys need a single primary, by itself or "
    "with Sentinel",
    "CROSSSLOT": "is part of a Cluster ({detail}); RQ's keys need a single primary, by itself or "
    "with Sentinel",
}
"""What to do about what the server says, by its first word."""
