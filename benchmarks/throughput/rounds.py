"""The parent: starts one fresh process per engine and round, in turn, and reads what it wrote."""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.children import ROOT, environment, module
from benchmarks.throughput.contest import Contestant
from benchmarks.throughput.models import ModelSpec, build
from benchmarks.throughput.workload import Workload, WorkloadSpec

__all__ = ["ChildError", "Entry", "Harness", "ModelRun"]

logger = logging.getLogger(__name__)

REFERENCE_CHUNK = 16
"""Requests between two writes: one by one takes minutes, and an interrupt shouldn't lose them."""


class ChildError(RuntimeError):
    """An engine's process failed; the message is the end of what it wrote."""


@dataclass
class Entry:
    """A contestant and its rounds on one model."""

    contestant: Contestant
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    indices: list[int]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    num_equal: int = 0
    num_matching_tokens: int = 0
    error: str | None = None


@dataclass
class ModelRun:
    """All that was measured on one model."""

    spec: ModelSpec
    workload: Workload
    entries: list[Entry]
    gemm: list[list[dict[str, Any]]] = field(default_factory=list)


@dataclass
class Harness:
    """Where children run: their cores, threads, Pythons and the cache of models."""

    cache: Path
    cores: list[int]
    threads: int
    pythons: Mapping[str, str]
    timeout_s: float

    def model(
        self, spec: ModelSpec, workload_spec: WorkloadSpec, num_requests: int | None
    ) -> tuple[Path, Workload]:
        """The model's folder and the workload in its tokens."""
        folder = build(spec, self.cache)
        workload = Workload.make(workload_spec, folder)
        if num_requests is not None:
            workload = workload.take(list(range(min(num_requests, len(workload.prompts)))))
        return folder, workload

    def probe(self, contestant: Contestant) -> Mapping[str, str] | str:
        """Versions of an engine's packages, or why it can't run."""
        job = {"imports": contestant.imports, "distributions": contestant.distributions}
        try:
            versions: Mapping[str, str] = self._child("probe", contestant.peer, job)["versions"]
        except ChildError as error:
            return str(error)
        return versions

    def measure(
        self, spec: ModelSpec, folder: Path, workload: Workload, entries: list[Entry], repeat: int
    ) -> ModelRun:
        """`repeat` rounds, each with every engine once and the limit; the order is shuffled."""
        run = ModelRun(spec, workload, entries)
        reference = self.reference(folder, workload)
        shuffle = random.Random(0)
        for number in range(repeat):
            logger.info("%s: round %d of %d", spec.name, number + 1, repeat)
            job = {"spec": spec.name, "threads": self.threads}
            run.gemm.append(self._child("gemm", "torch", job)["passes"])
            for entry in shuffle.sample(entries, len(entries)):
                if entry.error is None:
                    self._round(entry, folder, workload, reference)
        return run

    def _round(
        self, entry: Entry, folder: Path, workload: Workload, reference: list[list[int]]
    ) -> None:
        try:
            result = self.run(entry.contestant, entry.settings, folder, workload, entry.indices)
        except ChildError as error:
            logger.warning("%s: %s", entry.contestant.title, error)
            entry.error = str(error)
            return
        tokens = result.pop("tokens")
        expected = [reference[i] for i in entry.indices]
        pairs = list(zip(tokens, expected, strict=True))
        wrong = [i for i, (got, want) in enumerate(pairs) if len(got) != len(want)]
        if wrong:  # tokens per second would compare different work
            entry.error = f"{len(wrong)} requests have another length than was asked for"
            logger.warning("%s: %s", entry.contestant.title, entry.error)
            return
        entry.num_equal = sum(got == want for got, want in pairs)
        entry.num_matching_tokens = sum(_common(got, want) for got, want in pairs)
        entry.rounds.append(result)
        logger.info(
            "%s: %.0f tok/s, %d of %d as the reference",
            entry.contestant.title,
            result["output_tokens"] / result["elapsed_s"],
            entry.num_equal,
            len(entry.indices),
        )

    def run(
        self,
        contestant: Contestant,
        settings: Mapping[str, Any],
        folder: Path,
        workload: Workload,
        indices: list[int],
    ) -> dict[str, Any]:
        """One process, one timed run.

        :raises ChildError: if it fails or takes too long
        """
        converted = self.converted(contestant, folder)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "workload.json"
            workload.take(indices).save(path)
            job = {
                "module": contestant.module,
                "model": str(folder),
                "converted": converted and str(converted),
                "workload": str(path),
                "threads": self.threads,
                "settings": dict(settings),
            }
            return self._child("run", contestant.peer, job)

    def converted(self, contestant: Contestant, folder: Path) -> Path | None:
        """The model in the engine's own format, made once and kept beside the model."""
        if contestant.converter is None:
            return None
        target = folder.with_name(contestant.module)
        if not target.exists():
            logger.info("converting %s for %s", folder.parent.name, contestant.title)
            unfinished = target.with_name(target.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            job = {
                "module": contestant.module,
                "model": str(folder),
                "converted": str(unfinished),
            }
            self._child("convert", contestant.converter, job)
            unfinished.rename(target)
        return target

    def reference(self, folder: Path, workload: Workload) -> list[list[int]]:
        """Greedy fp32 tokens of `generate`, one request at a time; kept beside the model."""
        path = folder.with_name("reference.json")
        known: dict[str, list[int]] = {}
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
        digests = workload.digests
        missing = [i for i, digest in enumerate(digests) if digest not in known]
        one_by_one = Contestant("reference", "reference", "transformers_generate")
        for start in range(0, len(missing), REFERENCE_CHUNK):
            chunk = missing[start : start + REFERENCE_CHUNK]
            done = len(digests) - len(missing) + start
            logger.info("%s: reference tokens: %d of %d", folder.parent.name, done, len(digests))
            tokens = self.run(one_by_one, {}, folder, workload, chunk)["tokens"]
            known.update(zip((digests[i] for i in chunk), tokens, strict=True))
            path.write_text(json.dumps(known), encoding="utf-8")
        return [known[digest] for digest in digests]

    def _child(self, action: str, peer: str, job: Mapping[str, Any]) -> dict[str, Any]:
        python = self.pythons.get(peer, sys.executable)
        with tempfile.TemporaryDirectory() as scratch:
            job_path, result_path = Path(scratch) / "job.json", Path(scratch) / "result.json"
            cores = self.cores if action in ("run", "gemm") else []
            content = {**job, "action": action, "result": str(result_path), "cores": cores}
            job_path.write_text(json.dumps(content), encoding="utf-8")
            command = module("benchmarks.throughput.child", job_path, python=python)
            try:
                done = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=self._environment(),
                    capture_output=True,
                    text=True,
                    timeout=self.timeout_s,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise ChildError(f"no result within {self.timeout_s:.0f} s") from None
            except OSError as error:
                raise ChildError(f"{python}: {error}") from None
            if done.returncode or not result_path.exists():
                logger.debug("%s", done.stderr)
                raise ChildError(_last_words(done.stderr, done.returncode))
            result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
            return result

    def _environment(self) -> dict[str, str]:
        threads = dict.fromkeys(
            ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.threads)
        )
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        return environment(**threads, **offline, TOKENIZERS_PARALLELISM="false")


def _last_words(stderr: str, code: int) -> str:
    lines = [line for line in reversed(stderr.splitlines()) if line.strip()]
    # An exception's message may have many lines; its first one names the error.
    named = (line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line))
    last = lines[0].strip() if lines else f"ended with code {code} and no message"
    return next(named, last)[:200]


def _common(got: list[int], want: list[int]) -> int:
    """How many tokens are the same before the first that isn't."""
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        if a != b:
            return place
    return len(want)
