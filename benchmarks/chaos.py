"""Kill, stop and drain everything at random while a dataset runs; then count the answers.

    python benchmarks/chaos.py --requests 20000 --events 50 --seed 1

Real processes throughout: a private Redis (AOF), worker processes, and a producer that feeds and
collects. Each event hits one of them at a seeded random instant: workers are killed (-9), drained
(SIGTERM) or stopped past their lease (SIGSTOP, SIGCONT), the producer and Redis are killed (-9).
What ends is started again. Afterwards the output file must hold each request exactly once, with
the text of an undisturbed run. Exit code 0 if so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from queue_api.connection import connect
from queue_api.redis_server import EmbeddedRedis

ROOT = Path(__file__).parent.parent
TOKENS = 20
MODEL = f"echo:tokens={TOKENS},step_s=0.015"
LEASE_S = 2.0
EVENTS = {"kill": 8, "drain": 3, "stop": 3, "producer": 3, "redis": 3}
"""Kinds of event by how often they come."""


@dataclass
class Chaos:
    """One campaign."""

    folder: Path
    server: EmbeddedRedis
    draw: random.Random
    num_workers: int
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    producer: subprocess.Popen[bytes] | None = None
    happened: Counter[str] = field(default_factory=Counter)

    def start_worker(self) -> None:
        environment = {
            "REDIS_URL": self.server.url,
            "BATCHMILL_MODEL": MODEL,
            "BATCHMILL_LEASE_S": str(LEASE_S),
            "BATCHMILL_DRAIN_GRACE_S": "0.1",
            # the deaths here are accidents: none of the requests is to be taken for their cause
            "BATCHMILL_MAX_DEATHS": "1000",
        }
        self.workers.append(self._spawn([sys.executable, "-m", "workers", "worker"], environment))

    def start_producer(self) -> None:
        command = [sys.executable, str(Path(__file__)), "--produce", str(self.folder)]
        self.producer = self._spawn(command, {"REDIS_URL": self.server.url})

    def _spawn(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        log = (self.folder / "log").open("ab")
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, **environment}
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)

    def keep_going(self) -> bool:
        """Start again what ended; False once the producer has all answers."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < self.num_workers:
            self.start_worker()
        assert self.producer is not None
        if self.producer.poll() == 0:
            return False
        if self.producer.poll() is not None:
            self.start_producer()
        return True

    def strike(self) -> None:
        """Let one thing happen."""
        kind = self.draw.choices(list(EVENTS), list(EVENTS.values()))[0]
        self.happened[kind] += 1
        victim = self.draw.choice(self.workers)
        if kind == "kill":
            victim.kill()
        elif kind == "drain":
            victim.terminate()
        elif kind == "stop":
            victim.send_signal(signal.SIGSTOP)
            time.sleep(2 * LEASE_S)
            victim.send_signal(signal.SIGCONT)
        elif kind == "producer":
            assert self.producer is not None
            self.producer.kill()
        else:
            self.server.restart(kill=True)

    def run(self, num_events: int) -> None:
        """Strike so many times, as long as there is work, and let the rest finish."""
        while self.keep_going():
            time.sleep(self.draw.uniform(0.1, 1.2))
            if self.happened.total() < num_events and self.keep_going():
                self.strike()

    def end(self) -> None:
        for process in [*self.workers, self.producer]:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()


def prompt_of(index: int) -> str:
    return f"request {index} of many"


def text_of(index: int) -> str:
    """What the echo engine makes of it when nothing happens."""
    words = prompt_of(index).split()
    return " ".join(words[i % len(words)] for i in range(TOKENS))


def verdict(output: Path, total: int) -> list[str]:
    """What is wrong with the output; nothing, let us hope."""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    ids = Counter(row["id"] for row in rows)
    wrong = [f"{n} answers to {i}" for i, n in ids.items() if n != 1]
    wrong += [f"no answer to {i}" for i in map(str, range(total)) if i not in ids]
    wrong += [
        f"{row['id']}: {row.get('finish_reason')} {row.get('error')} {row.get('text')!r:.80}"
        for row in rows
        if row.get("text") != text_of(int(row["id"]))
    ]
    return wrong


async def produce(folder: Path) -> None:
    """The producer's whole life, as often as it takes."""
    from queue_api.client import Client
    from queue_api.datasets import run_dataset
    from queue_api.settings import QueueSettings

    settings = QueueSettings.load(reconcile_s=1.0)
    async with Client(settings=settings) as client:
        await run_dataset(client, folder / "in.jsonl", folder / "out.jsonl", window=4096)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--events", type=int, default=50)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--produce", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.produce is not None:
        asyncio.run(produce(options.produce))
        return 0
    with tempfile.TemporaryDirectory() as name, EmbeddedRedis() as server:
        folder = Path(name)
        with (folder / "in.jsonl").open("w") as rows:
            for index in range(options.requests):
                row = {"id": str(index), "prompt": prompt_of(index), "max_tokens": TOKENS}
                rows.write(json.dumps(row) + "\n")
        started = time.perf_counter()
        chaos = Chaos(folder, server, random.Random(options.seed), options.workers)
        try:
            chaos.start_producer()
            chaos.run(options.events)
        finally:
            chaos.end()
        wrong = verdict(folder / "out.jsonl", options.requests)
        memory = connect(server.url).info("memory")["used_memory_peak_human"]
        struck = ", ".join(f"{kind} {n}" for kind, n in sorted(chaos.happened.items()))
        print(
            f"seed {options.seed}: {options.requests} requests, {chaos.happened.total()} events "
            f"({struck}) in {time.perf_counter() - started:.0f} s; Redis peak {memory}; "
            f"{len(wrong)} wrong"
        )
        if wrong:
            print("\n".join(wrong[:20]))
            print((folder / "log").read_text()[-20_000:], file=sys.stderr)
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
