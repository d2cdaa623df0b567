"""Keeps the leases of what a worker holds, and notices what nobody wants any more."""

from __future__ import annotations

import redis.asyncio as aredis

from workers.claim.run_lookup import look_up
from workers.leases import Leases
from workers.running.runner import Runner

__all__ = ["Keeper"]


class Keeper:
    """Heartbeats of a runner."""

    def __init__(self, connection: aredis.Redis, leases: Leases, runner: Runner) -> None:
        self._connection = connection
        self._leases = leases
        self._runner = runner

    async def beat(self) -> bool:
        """Renew all leases and act on what changed; False if RQ has forgotten the worker."""
        active = self._runner.active
        state = "suspended" if self._runner.is_suspended else "busy" if active else "idle"
        beat = await self._leases.renew([job.lease for job in active.values()], state)
        for execution_id, status in beat.lost.items():
            self._runner.lose(execution_id, status)
        await self._drop_unwanted()
        return beat.is_known

    async def _drop_unwanted(self) -> None:
        """Stop what a client has cancelled: whole runs, and requests answered in our stead."""
        left: dict[str, list[int]] = {}
        for job in self._runner.active.values():
            if job.run is not None and not job.is_ending:
                left.setdefault(job.run, []).extend(job.left)
        found = await look_up(self._connection, list(left), left)
        for job in list(self._runner.active.values()):
            if job.run is None or job.is_ending:
                continue
            self._runner.drop(job, found.done.get(job.run, frozenset()))
            if job.run in found.cancelled and not job.is_ending:
                self._runner.cancel(job)
