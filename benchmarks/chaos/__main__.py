"""Kill workers, clients and Redis at seeded random instants; see whether every request ends once.

    python -m benchmarks.chaos                                    # 50 kills, 20,000 requests
    python -m benchmarks.chaos --seed 7 --kills 6 --requests 1000 --demo 20

The report goes to stdout, progress to stderr. Exit code 1 if anything was lost, doubled or
different; the folder with everyone's logs is then kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.chaos.audit import Audit
from benchmarks.chaos.harness import ChaosSettings, StuckError, disturb, expected_outcomes
from benchmarks.chaos.report import report
from benchmarks.chaos.workload import make_parts

logger = logging.getLogger("benchmarks.chaos")


def main() -> int:
    options = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    settings = ChaosSettings(
        seed=options.seed,
        num_requests=options.requests,
        num_demo=min(options.demo, options.requests),
        kills=options.kills,
        lease_s=options.lease,
        max_deaths=options.max_deaths,
    )
    folder = Path(tempfile.mkdtemp(prefix="batchmill-chaos-"))
    logger.info("logs and outputs: %s", folder)
    parts = make_parts(settings.seed, settings.num_requests, settings.num_demo)
    audit = Audit(expected_outcomes(parts, folder))
    try:
        happened = disturb(settings, parts, folder, audit)
    except StuckError as error:
        print(f"STUCK: {error}; see {folder}")
        return 1
    found = report(settings, happened, audit)
    print(found.text)
    if options.output is not None:
        options.output.write_text(json.dumps(found.numbers, indent=1) + "\n", encoding="utf-8")
    if audit.violations:
        print(f"logs and outputs: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def _arguments() -> argparse.Namespace:
    default = asdict(ChaosSettings())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=default["seed"])
    parser.add_argument("--kills", type=int, default=default["kills"], help="kill -9s (50)")
    parser.add_argument("--requests", type=int, default=default["num_requests"])
    parser.add_argument(
        "--demo", type=int, default=default["num_demo"], help="of them to the demo model (400)"
    )
    parser.add_argument("--lease", type=float, default=default["lease_s"], help="seconds (2)")
    parser.add_argument("--max-deaths", type=int, default=default["max_deaths"])
    parser.add_argument("--output", type=Path, help="a file for the numbers, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
