"""Measure what batchmill's queue costs, and its peers', in one run on one core.

    python -m benchmarks.job_queue                             # everything but the million
    python -m benchmarks.job_queue --quick                     # a smoke run
    python -m benchmarks.job_queue --only million --million 1000000
    python -m benchmarks.job_queue --peer-python arq=other/bin/python

Client, worker and Redis share the core. The tables go to stdout, progress to stderr, everything to
--output as JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks.arguments import cores, names_among, peer_python
from benchmarks.job_queue import idle_latency, million, worker_cost
from benchmarks.job_queue.comparison import compare, goal, goals, table
from benchmarks.job_queue.contest import CONTESTANTS

PARTS = ("systems", "worker", "latency", "million")
DEFAULT_PARTS = PARTS[:3]
WORKER_SHARE, OVERHEAD_MS = 0.02, 10.0
"""Goals: of a core at 200 requests/s; of a call while nothing else goes on."""


def main() -> int:
    options = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # before anything is started: children, Redis among them, inherit it
    os.sched_setaffinity(0, options.cores)
    scale, repeat = (0.05, 1) if options.quick else (1.0, options.repeat)
    chosen = [c for c in CONTESTANTS if not options.systems or c.key in options.systems]
    found: dict[str, Any] = {"machine": _machine(options.cores), "goals": []}
    if "systems" in options.only:
        found["systems"] = compare(chosen, dict(options.peer_python), repeat, scale)
        found["goals"] += goals(found["systems"])
        print(table(found["systems"]), end="\n\n")
    if "worker" in options.only:
        seconds = 3 if options.quick else 20
        found["worker"] = [worker_cost.measure(seconds, chunk_size=size) for size in (32, 1)]
        for cost in found["worker"]:
            print(
                f"worker at {cost['requests_per_s']:.0f} requests/s, chunk {cost['chunk_size']}: "
                f"the queue takes {cost['queue_share']:.1%} of a core, "
                f"{cost['queue_us_per_request']:.0f} µs a request"
            )
        name = "worker's share of a core for the queue, 200 requests/s"
        share = found["worker"][0]["queue_share"]
        found["goals"].append(goal(name, share, WORKER_SHARE, at_most=True))
    if "latency" in options.only:
        found["latency"] = measured = idle_latency.measure(30 if options.quick else 300)
        print(
            f"one call at a time: {measured['direct_ms']:.1f} ms by the engine, "
            f"{measured['through_redis_ms']:.1f} ms through Redis "
            f"(95 % within {measured['through_redis_p95_ms']:.1f} ms)"
        )
        overhead = measured["overhead_ms"]
        found["goals"].append(goal("ms that Redis adds", overhead, OVERHEAD_MS, at_most=True))
    if "million" in options.only:
        found["million"] = measured = million.measure(options.million)
        print(
            f"{measured['requests']:,} rows in {measured['elapsed_s']:.0f} s "
            f"({measured['rows_per_s']:,.0f}/s), {'each once' if measured['complete'] else 'WRONG'}"
            f"; Redis held at most {measured['redis_bytes_peak'] / 2**20:.1f} MiB "
            f"({measured['redis_bytes_before'] / 2**20:.1f} before, "
            f"{measured['redis_bytes_after'] / 2**20:.1f} after)"
        )
    print()
    for one in found["goals"]:
        sign = "at most" if one["at_most"] else "at least"
        verdict = "met" if one["met"] else "MISSED"
        print(f"{verdict}: {one['goal']}: {one['value']:.3g} ({sign} {one['limit']:g})")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _machine(cores: list[int]) -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": cores,
        "load_average": os.getloadavg(),
    }


def _arguments() -> argparse.Namespace:
    keys = [contestant.key for contestant in CONTESTANTS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.job_queue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few requests, one round")
    parser.add_argument(
        "--only", type=names_among(PARTS), default=DEFAULT_PARTS, help=",".join(PARTS)
    )
    parser.add_argument("--systems", type=names_among(keys), help=f"some of {','.join(keys)}")
    parser.add_argument("--repeat", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--million", type=int, default=1_000_000, help="how many that is")
    parser.add_argument("--cores", type=cores, default=[0], help="such as 0,1 (default 0)")
    parser.add_argument(
        "--peer-python",
        type=peer_python,
        action="append",
        default=[],
        metavar="SYSTEM=PYTHON",
        help="the Python that has a system's library; arq needs an older redis-py",
    )
    parser.add_argument("--output", type=Path, help="a file for everything, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
