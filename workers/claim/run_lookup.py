"""What a worker has to know of runs before it starts their jobs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import redis.asyncio as aredis

from queue_api.connection.failures import raise_unless_key
from queue_api.store.keys import RunKeys

__all__ = ["RunLookup", "look_up"]


@dataclass(frozen=True, slots=True)
class RunLookup:
    """The state of some runs."""

    cancelled: frozenset[str]
    done: Mapping[str, frozenset[int]]
    """By run: which of the indexes asked for have a result already."""


async def look_up(
    connection: aredis.Redis, runs: Collection[str], indexes: Mapping[str, Collection[int]]
) -> RunLookup:
    """Ask in one round trip; raises what Redis says of more than one run.

    :param indexes: by run, the requests that may have been answered before
    """
    if not runs:
        return RunLookup(frozenset(), {})
    pipeline = connection.pipeline(transaction=False)
    for run in runs:
        pipeline.hget(RunKeys.of(run).hash, "cancelled")
    for run, wanted in indexes.items():
        reads = [part for index in wanted for part in ("GET", "u1", index)]
        pipeline.execute_command("BITFIELD_RO", RunKeys.of(run).done, *reads)
    # an error reply (somebody else's key under a run's name) must not hurt the other runs
    replies = await pipeline.execute(raise_on_error=False)
    raise_unless_key(replies)
    flags, bitmaps = replies[: len(runs)], replies[len(runs) :]
    done = {
        run: frozenset(index for index, bit in zip(wanted, bits, strict=True) if bit)
        for (run, wanted), bits in zip(indexes.items(), bitmaps, strict=True)
        if isinstance(bits, list)
    }
    return RunLookup(
        frozenset(run for run, flag in zip(runs, flags, strict=True) if flag == b"1"), done
    )
