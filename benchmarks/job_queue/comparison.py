"""The contest: every system in a fresh process against a fresh Redis, in turn, on the same core."""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.children import environment, module
from benchmarks.job_queue.contest import BARE, JOB_QUEUES, Contestant
from queue_api.connection.embedded import EmbeddedRedis

__all__ = ["ChildError", "compare", "goals", "table"]

logger = logging.getLogger(__name__)

TIMEOUT_S = 600
OF_STREAMS, OF_JOB_QUEUES = 0.5, 8.0
"""Goals: our life-cycle rate in chunks of 32 against theirs."""


class ChildError(RuntimeError):
    """A system's process failed; the message is the end of what it wrote."""


@dataclass(frozen=True)
class Pythons:
    """Which Python has a system's library."""

    given: Mapping[str, str]

    def run(self, contestant: Contestant, action: str, **job: Any) -> dict[str, Any]:
        """:raises ChildError: if it fails or takes too long"""
        python = self.given.get(contestant.key, sys.executable)
        content = {"module": contestant.module, "distribution": contestant.distribution}
        content |= {"settings": contestant.settings, "action": action, **job}
        with tempfile.TemporaryDirectory() as scratch:
            path, result = Path(scratch) / "job.json", Path(scratch) / "result.json"
            path.write_text(json.dumps({**content, "result": str(result)}), encoding="utf-8")
            command = module("benchmarks.job_queue.child", path, python=python)
            try:
                done = subprocess.run(
                    command,
                    env=environment(),
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT_S,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise ChildError(str(error)) from None
            if done.returncode:
                last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
                raise ChildError(last[0] if last else f"ended with code {done.returncode}")
            found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return found


def compare(
    contestants: Sequence[Contestant], pythons: Mapping[str, str], repeat: int, scale: float
) -> dict[str, dict[str, Any]]:
    """By key: what was measured, or `error`; medians over `repeat` interleaved rounds."""
    children = Pythons(pythons)
    found: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        entry: dict[str, Any] = {"title": contestant.title, "rounds": []}
        try:
            entry["versions"] = children.run(contestant, "probe")
        except ChildError as error:
            entry["error"] = f"not installed: {error}"
            logger.info("left out: %s: %s", contestant.title, error)
        found[contestant.key] = entry
    for number in range(repeat):
        for contestant in contestants:
            entry = found[contestant.key]
            if "error" in entry:
                continue
            count = max(200, int(contestant.num_requests * scale))
            try:
                with EmbeddedRedis() as server:
                    measured = children.run(contestant, "run", url=server.url, num_requests=count)
            except ChildError as error:
                entry["error"] = str(error)
                logger.warning("%s: %s", contestant.title, error)
                continue
            entry["rounds"].append(_rates(measured, count))
            rate = entry["rounds"][-1]["life_cycle_per_s"]
            logger.info("round %d: %s: %.0f requests/s", number + 1, contestant.title, rate)
    for entry in found.values():
        if entry["rounds"] and "error" not in entry:
            names = entry["rounds"][0]
            entry |= {n: statistics.median(r[n] for r in entry["rounds"]) for n in names}
    return found


def _rates(measured: Mapping[str, float], count: int) -> dict[str, float]:
    total_s = measured["enqueue_s"] + measured["work_s"] + measured["results_s"]
    return {
        "requests": count,
        "enqueue_per_s": count / measured["enqueue_s"],
        "work_per_s": count / measured["work_s"],
        "results_per_s": count / measured["results_s"],
        "life_cycle_per_s": count / total_s,
        "redis_cpu_us": measured["redis_cpu_s"] / count * 1e6,
        "queued_bytes": measured["queued_bytes"] / count,
        "finished_bytes": measured["finished_bytes"] / count,
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown, the fastest first."""
    lines = [
        "| system | enqueue/s | work/s | results/s | life-cycle/s | Redis µs | bytes queued | "
        "bytes finished |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    measured = [entry for entry in found.values() if "life_cycle_per_s" in entry]
    for entry in sorted(measured, key=lambda entry: -entry["life_cycle_per_s"]):
        rates = ("enqueue_per_s", "work_per_s", "results_per_s", "life_cycle_per_s")
        costs = ("redis_cpu_us", "queued_bytes", "finished_bytes")
        numbers = [f"{entry[name]:,.0f}" for name in (*rates, *costs)]
        lines.append(f"| {entry['title']} | {' | '.join(numbers)} |")
    lines += [
        f"\nNot measured: {entry['title']} ({entry['error']})"
        for entry in found.values()
        if "error" in entry
    ]
    return "\n".join(lines)


def goals(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ours in chunks of 32 against bare Streams and the best job queue, as far as measured."""
    rates = {key: e["life_cycle_per_s"] for key, e in found.items() if "life_cycle_per_s" in e}
    ours = rates.get("batchmill-32")
    if ours is None:
        return []
    stated = []
    if BARE in rates:
        stated.append(goal("life-cycle, chunk 32, of bare Streams", ours / rates[BARE], OF_STREAMS))
    if best := max((rates[key] for key in JOB_QUEUES if key in rates), default=0.0):
        stated.append(
            goal("life-cycle, chunk 32, of the best job queue", ours / best, OF_JOB_QUEUES)
        )
    return stated


def goal(name: str, value: float, limit: float, *, at_most: bool = False) -> dict[str, Any]:
    """A goal and whether it was met."""
    met = value <= limit if at_most else value >= limit
    return {"goal": name, "value": value, "limit": limit, "at_most": at_most, "met": met}
