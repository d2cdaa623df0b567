"""What goes wrong, and when: drawn beforehand, from the seed alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["OF_REDIS", "Fault", "Kind", "draw_faults"]

LAST_AT = 0.9
"""No fault is due later than at this part of the requests, so that all of them meet work."""


class Kind(StrEnum):
    KILL_WORKER = "kill -9 of a worker"
    KILL_CLIENT = "kill -9 of a client"
    KILL_REDIS = "kill -9 of Redis"
    TERM_WORKER = "SIGTERM to a worker"
    STOP_WORKER = "SIGSTOP of a worker past its lease, SIGCONT"
    STOP_REDIS = "SIGSTOP of Redis past the leases, SIGCONT"
    FULL_REDIS = "a full Redis, given more memory after the leases' time"
    FULL_DISK = "a Redis whose disk is full for longer than the leases"
    TAKEOVER = "a Redis that lacks replicas to write, then a replica's takeover"


KILLS = (Kind.KILL_WORKER, Kind.KILL_CLIENT, Kind.KILL_REDIS)
_KILL_WEIGHTS = (5, 3, 2)
OF_REDIS = (Kind.STOP_REDIS, Kind.FULL_REDIS, Kind.FULL_DISK, Kind.TAKEOVER)
"""What it survives."""


@dataclass(frozen=True)
class Fault:
    """One fault. It is due at a part of the work, not at a time: machines differ in speed."""

    kind: Kind
    at: float
    """The part of all requests that have to be done."""
    delay_s: float
    """After that, a random moment more."""
    victim: float
    """In [0, 1): where in the list of those that could be meant."""
    length_s: float
    """How long Redis stays away or takes no writes, or a process stands still."""


def draw_faults(seed: int, kills: int, lease_s: float) -> list[Fault]:
    """`kills` kills and a fifth as many of each of the other kinds, in the order they are due."""
    draw = random.Random(seed)
    kinds = draw.choices(KILLS, _KILL_WEIGHTS, k=kills)
    # each at least once, however few
    kinds[: len(KILLS)] = KILLS[:kills]
    others = max(1, kills // 5)
    kinds += [Kind.TERM_WORKER] * others + [Kind.STOP_WORKER] * others
    for kind in OF_REDIS:
        kinds += [kind] * max(1, kills // 20)
    return sorted((_draw(draw, kind, lease_s) for kind in kinds), key=lambda fault: fault.at)


def _draw(draw: random.Random, kind: Kind, lease_s: float) -> Fault:
    is_stop = kind in (Kind.STOP_WORKER, *OF_REDIS)
    length_s = draw.uniform(1.2, 2.5) * lease_s if is_stop else draw.uniform(0.0, 1.0)
    return Fault(kind, draw.uniform(0.0, LAST_AT), draw.uniform(0.0, 0.5), draw.random(), length_s)
