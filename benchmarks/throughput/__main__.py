"""Measure batchmill and its peers on the same work, in one run on this machine.

    python -m benchmarks.throughput                        # M1 and M2, everyone who is installed
    python -m benchmarks.throughput --models M1 --repeat 1 --engines batchmill,openvino
    python -m benchmarks.throughput --quick                # a smoke run of a minute
    python -m benchmarks.throughput --tune openvino        # which of its settings is best here

The table goes to stdout, progress to stderr, JSON and picture to --output.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from benchmarks.arguments import cores, names_among, peer_python
from benchmarks.throughput import report
from benchmarks.throughput.contest import CONTESTANTS, Contestant
from benchmarks.throughput.models import MODELS
from benchmarks.throughput.rounds import ChildError, Entry, Harness
from benchmarks.throughput.workload import QUICK, W

logger = logging.getLogger(__package__)


def main() -> int:
    options = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if options.verbose:
        logger.setLevel(logging.DEBUG)
    cores = options.cores or sorted(os.sched_getaffinity(0))[: options.threads]
    harness = Harness(
        options.cache.resolve(), cores, options.threads, dict(options.peer_python), options.timeout
    )
    if options.tune:
        return _tune(harness, options)
    chosen = [c for c in CONTESTANTS if not options.engines or c.key in options.engines]
    versions, absent = _present(harness, chosen)
    runs = []
    for name in ["tiny"] if options.quick else options.models:
        spec = MODELS[name]
        folder, workload = harness.model(spec, QUICK if options.quick else W, options.requests)
        number = len(workload.prompts)
        entries = [
            Entry(c, c.settings, versions[c.key], list(range(number))[:: c.every])
            for c in chosen
            if c.key in versions
        ]
        runs.append(harness.measure(spec, folder, workload, entries, options.repeat))
    summary = report.summarize(runs, harness, absent)
    options.output.mkdir(parents=True, exist_ok=True)
    report.write(summary, options.output / "throughput.json")
    if not report.draw(summary, options.output / "throughput.svg"):
        logger.warning("no picture: matplotlib isn't installed (pip install 'batchmill[bench]')")
    for name, model in summary["models"].items():
        print(report.table(name, model), end="\n\n")
    for title, reason in absent.items():
        print(f"Not measured: {title} ({reason})")
    logger.info("written: %s", options.output)
    return 1 if any(entry.error for run in runs for entry in run.entries) else 0


def _present(
    harness: Harness, chosen: list[Contestant]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Versions of those who can run here, and why the others can't."""
    versions: dict[str, dict[str, str]] = {}
    absent: dict[str, str] = {}
    for contestant in chosen:
        found = harness.probe(contestant)
        if isinstance(found, str):
            absent[contestant.title] = found
            logger.info("left out: %s: %s", contestant.title, found)
        else:
            versions[contestant.key] = dict(found)
    return versions, absent


def _tune(harness: Harness, options: argparse.Namespace) -> int:
    """Each of a contestant's settings once, on the first model named."""
    folder, workload = harness.model(MODELS[options.models[0]], W, options.requests)
    indices = list(range(len(workload.prompts)))
    for contestant in CONTESTANTS:
        if contestant.key not in options.tune:
            continue
        for settings in contestant.tries or (contestant.settings,):
            try:
                result = harness.run(contestant, settings, folder, workload, indices)
            except ChildError as error:
                print(f"{contestant.key} {settings}: {error}", flush=True)
                continue
            speed = result["output_tokens"] / result["elapsed_s"]
            print(f"{contestant.key} {settings}: {speed:.1f} tok/s", flush=True)
    return 0


def _arguments() -> argparse.Namespace:
    keys = [contestant.key for contestant in CONTESTANTS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and workload")
    parser.add_argument("--models", type=names_among(list(MODELS)), default=["M1", "M2"])
    parser.add_argument("--engines", type=names_among(keys), help=f"some of {','.join(keys)}")
    parser.add_argument("--tune", type=names_among(keys), help="try the settings of these engines")
    parser.add_argument("--requests", type=int, help="only the first so many of the workload")
    parser.add_argument("--repeat", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="for each engine (default 2)")
    parser.add_argument("--cores", type=cores, help="such as 0,1; the first --threads by default")
    parser.add_argument(
        "--peer-python",
        type=peer_python,
        action="append",
        default=[],
        metavar="PEER=PYTHON",
        help="the Python that has a peer, such as openvino-export=venv/bin/python",
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("out/bench"), help="models are kept here"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one process")
    parser.add_argument("--verbose", action="store_true", help="what failing engines write, whole")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
