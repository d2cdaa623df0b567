"""What each request's result has to be: the engine alone, undisturbed, in a process of its own.

`python -m benchmarks.chaos.reference JOB.json`, started by the harness, which has no torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from queue_api.client.submission import as_request
from queue_api.wire.errors import RequestError
from workers.running.engines import load_engine
from workers.settings import WorkerSettings

__all__ = ["Outcome"]

Outcome = tuple[str, str]
"""Finish reason and text."""


def outcomes(model: str, runs: list[tuple[str, list[dict[str, object]]]]) -> list:
    """Per run, the outcome of each row."""
    engine = load_engine(WorkerSettings.load(model=model, num_threads=1))
    found: dict[str, Outcome] = {}
    for run, rows in runs:
        for index, row in enumerate(rows):
            key = f"{run}/{index}"
            try:
                request = as_request(row, index)
                engine.add(key, request, seed_key=f"{run}/{request.id}")
            except RequestError:
                found[key] = ("error", "")
    while engine.has_unfinished():
        for done in engine.step():
            reason = "error" if done.error is not None else done.finish_reason.value
            found[done.key] = (reason, "" if done.error is not None else done.text)
    engine.close()
    return [[run, [found[f"{run}/{index}"] for index in range(len(rows))]] for run, rows in runs]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = outcomes(job["model"], job["runs"])
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
