"""Starts everything, breaks it as drawn, starts it again, and waits for the clients to finish."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import redis

from benchmarks.chaos.faults import KILLS, OF_REDIS, Fault, Kind, draw_faults
from benchmarks.chaos.processes import Supervised
from benchmarks.chaos.servers import ServerPair
from benchmarks.chaos.workload import DEMO_QUEUE, ECHO_QUEUE, MOST_TOKENS, Part
from benchmarks.children import environment, module
from queue_api.connection.connect import connect
from queue_api.store.keys import RunKeys

__all__ = ["ChaosSettings", "Disturbed", "StuckError", "disturb", "expected_outcomes"]

logger = logging.getLogger(__name__)

Outcomes = dict[str, list[tuple[str, str]]]
"""By run: finish reason and text of each request, by index."""
ECHO_SEQS = 32
KILL_EVERY_S = 2.0
"""The echo engines are slowed down so that about one kill comes in so much time."""
LOOK_EVERY_S, TEND_EVERY_S = 0.1, 0.01
LOGGED = "%(asctime)s %(levelname)s %(name)s %(message)s"


class StuckError(RuntimeError):
    """Nothing was answered for so long that nothing more will be."""


@dataclass(frozen=True)
class ChaosSettings:
    """One run of the harness; the same seed gives the same requests and faults."""

    seed: int = 0
    num_requests: int = 20_000
    num_demo: int = 400
    """Of these, how many go to workers with the demo model."""
    kills: int = 50
    echo_workers: int = 3
    demo_workers: int = 2
    lease_s: float = 2.0
    max_deaths: int = 20
    """More than chance makes of one request: here nobody's request is to blame."""
    patience_s: float = 60.0
    """Without any answer for so long, the run is stuck."""

    @property
    def step_s(self) -> float:
        """A step of the echo engines."""
        at_a_time = self.echo_workers * ECHO_SEQS
        steps = self.num_requests / at_a_time * (MOST_TOKENS + 1) / 2
        return round(self.kills * KILL_EVERY_S / steps, 4)


@dataclass
class Disturbed:
    """What happened."""

    folder: Path
    parts: list[Part]
    faults: Counter[Kind] = field(default_factory=Counter)
    elapsed_s: float = 0.0
    starts: Mapping[str, int] = field(default_factory=dict)
    exit_codes: Mapping[str, list[int]] = field(default_factory=dict)
    bad_drains: list[str] = field(default_factory=list)
    """Workers that didn't end with 0 when they were asked to at the end."""
    duplicates_suppressed: int = 0
    """Results that Redis was sent for requests that had one; counted there, but for those of the
    last moments before it was killed."""

    def output(self, part: Part) -> Path:
        return self.folder / f"{part.name}.out.jsonl"

    @property
    def kills(self) -> int:
        return sum(self.faults[kind] for kind in KILLS)


def expected_outcomes(parts: list[Part], folder: Path) -> Outcomes:
    """What an engine says that nobody disturbs, in a process of its own for each model."""
    expected: Outcomes = {}
    models = {ECHO_QUEUE: f"echo:tokens={MOST_TOKENS}", DEMO_QUEUE: "demo"}
    for queue, model in models.items():
        runs = [run for part in parts if part.queue == queue for run in part.runs()]
        if not runs:
            continue
        job, result = folder / f"{queue}.job.json", folder / f"{queue}.expected.json"
        logger.info("asking an undisturbed engine, %s, for the same", model)
        content = {"model": model, "runs": runs, "result": str(result)}
        job.write_text(json.dumps(content), encoding="utf-8")
        subprocess.run(module("benchmarks.chaos.reference", job), env=environment(), check=True)
        for run, found in json.loads(result.read_text(encoding="utf-8")):
            expected[run] = [(reason, text) for reason, text in found]
    return expected


def disturb(
    settings: ChaosSettings,
    parts: list[Part],
    folder: Path,
    audit: Callable[[Disturbed, redis.Redis], None],
) -> Disturbed:
    """Run all requests through all faults, then let `audit` look at what is in Redis.

    :raises StuckError: when nothing is answered any more; logs are in the folder
    """
    happened = Disturbed(folder, parts)
    with ServerPair() as servers:
        chaos = _Chaos(settings, happened, servers)
        try:
            chaos.run()
            chaos.drain()
            audit(happened, chaos.connection)
        finally:
            chaos.close()
    return happened


class _Chaos:
    """One run: a loop that tends processes, watches how far the work is, and does what is due."""

    def __init__(self, settings: ChaosSettings, happened: Disturbed, servers: ServerPair) -> None:
        self._settings = settings
        self._happened = happened
        self._servers = servers
        self.connection = connect(servers.url, max_connections=2)
        self._undue = draw_faults(settings.seed, settings.kills, settings.lease_s)
        self._timed: list[tuple[float, Callable[[], None]]] = []
        """(monotonic seconds, what to do then)"""
        self._is_redis_up = True
        self._runs = [run for part in happened.parts for run, _ in part.runs()]
        self._done = 0
        self._workers = self._make_workers()
        self._clients = {part.name: self._make_client(part) for part in happened.parts}

    def _make_workers(self) -> list[Supervised]:
        settings = self._settings
        echo = f"echo:tokens={MOST_TOKENS},step_s={settings.step_s},max_num_seqs={ECHO_SEQS}"
        shared = {
            "BATCHMILL_REDIS_URL": self._servers.url,
            "BATCHMILL_LEASE_S": str(settings.lease_s),
            "BATCHMILL_MAX_DEATHS": str(settings.max_deaths),
            "BATCHMILL_DRAIN_GRACE_S": "1",
            "BATCHMILL_CHECKPOINT_TOKENS": "16",
            # every worker a thread of its own: there are more of them than cores
            "BATCHMILL_NUM_THREADS": "1",
        }
        kinds = [(ECHO_QUEUE, echo, settings.echo_workers)]
        if settings.num_demo:
            kinds.append((DEMO_QUEUE, "demo", settings.demo_workers))
        return [
            Supervised(
                f"{queue}-worker-{number}",
                ["batchmill", "worker", "--queues", queue, "--model", model],
                shared,
                self._happened.folder / f"{queue}-worker-{number}.log",
                once=False,
            )
            for queue, model, count in kinds
            for number in range(count)
        ]

    def _make_client(self, part: Part) -> Supervised:
        rows, output = part.save(self._happened.folder), self._happened.output(part)
        if part.client == "rows":
            command = ["batchmill", "run", str(rows), "-o", str(output), "--workers", "0"]
            command += ["--queue", part.queue, "--run", part.name, "--window", "1024"]
        else:
            command = ["benchmarks.chaos.clients", part.client, str(rows), str(output)]
        environment = {
            "BATCHMILL_REDIS_URL": self._servers.url,
            "BATCHMILL_RECONCILE_S": "1",
            # so that there is submitting to be interrupted all the time
            "BATCHMILL_MAX_QUEUE": "40",
        }
        log = self._happened.folder / f"{part.name}-client.log"
        return Supervised(f"client {part.name}", command, environment, log, once=True)

    # --- the loop ----------------------------------------------------------------------------

    def run(self) -> None:
        """Until every client is through."""
        started_at = heard_at = looked_at = time.monotonic()
        while not all(client.is_through for client in self._clients.values()):
            now = time.monotonic()
            for process in (*self._workers, *self._clients.values()):
                process.tend()
            for moment, act in [timed for timed in self._timed if timed[0] <= now]:
                self._timed.remove((moment, act))
                act()
            if now - looked_at >= LOOK_EVERY_S and self._is_redis_up:
                looked_at = now
                if self._look():
                    heard_at = now
                self._take_due(now)
            if now - heard_at > self._settings.patience_s:
                raise StuckError(f"{self._done} requests done, no more in {now - heard_at:.0f} s")
            time.sleep(TEND_EVERY_S)
        self._happened.elapsed_s = time.monotonic() - started_at
        everyone = [*self._workers, *self._clients.values()]
        self._happened.starts = {one.name: one.num_starts for one in everyone}
        self._happened.exit_codes = {one.name: one.exit_codes for one in everyone}

    def _look(self) -> bool:
        """See how far the work is; True if it is further than before."""
        before = self._done
        with suppress(redis.RedisError):
            pipeline = self.connection.pipeline()
            for run in self._runs:
                pipeline.hmget(RunKeys.of(run).hash, "done", "suppressed")
            counts = [[int(count or 0) for count in both] for both in pipeline.execute()]
            self._done = sum(done for done, _ in counts)
            self._happened.duplicates_suppressed = sum(suppressed for _, suppressed in counts)
        return self._done > before

    def _take_due(self, now: float) -> None:
        total = self._settings.num_requests
        while self._undue and self._undue[0].at * total <= self._done:
            fault = self._undue.pop(0)
            self._timed.append((now + fault.delay_s, lambda fault=fault: self._do(fault)))  # type: ignore[misc]

    # --- faults ------------------------------------------------------------------------------

    def _do(self, fault: Fault) -> None:
        kind = fault.kind
        if kind in (Kind.KILL_REDIS, *OF_REDIS):
            self._break_redis(fault)
            return
        clients = [client for client in self._clients.values() if client.is_running]
        if kind is Kind.KILL_CLIENT and not clients:
            kind = Kind.KILL_WORKER
        among = clients if kind is Kind.KILL_CLIENT else self._workers
        among = [process for process in among if process.is_running]
        if not among:  # all of them just died: a moment later there will be one
            self._later(0.2, lambda: self._do(fault))
            return
        victim = among[int(fault.victim * len(among))]
        self._note(kind, victim.name)
        if kind is Kind.STOP_WORKER:
            victim.send(signal.SIGSTOP)
            self._later(fault.length_s, lambda: victim.send(signal.SIGCONT))
        else:
            victim.send(signal.SIGTERM if kind is Kind.TERM_WORKER else signal.SIGKILL)

    def _break_redis(self, fault: Fault) -> None:
        if not self._is_redis_up:  # down as it is: another time
            self._later(0.5, lambda: self._do(fault))
            return
        self._note(fault.kind, "Redis")
        self._look()
        self._is_redis_up = False
        servers = self._servers
        begin, end = {
            Kind.KILL_REDIS: (servers.kill, servers.restart),
            Kind.STOP_REDIS: (servers.stop, servers.go_on),
            Kind.FULL_REDIS: (servers.fill_memory, servers.add_memory),
            Kind.FULL_DISK: (servers.fill_disk, servers.add_disk),
            Kind.TAKEOVER: (servers.refuse_writes, servers.take_over),
        }[fault.kind]
        begin()
        self._later(fault.length_s, lambda: self._end_of_break(end))

    def _end_of_break(self, end: Callable[[], None]) -> None:
        end()
        self._is_redis_up = True

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self._timed.append((time.monotonic() + seconds, act))

    def _note(self, kind: Kind, victim: str) -> None:
        self._happened.faults[kind] += 1
        logger.info("%d done: %s: %s", self._done, kind.value, victim)

    # --- the end -----------------------------------------------------------------------------

    def drain(self) -> None:
        """Make everything whole again, then end the workers in order."""
        if not self._is_redis_up:
            self._servers.make_whole()
            self._is_redis_up = True
        for worker in self._workers:
            was_running = worker.is_running
            code = worker.end(timeout_s=30.0)
            if was_running and code != 0:
                self._happened.bad_drains.append(f"{worker.name} ended with {code}")
        self._look()

    def close(self) -> None:
        """End what still runs, however the run ended."""
        for process in (*self._workers, *self._clients.values()):
            process.end(timeout_s=0.0)
        self.connection.close()
