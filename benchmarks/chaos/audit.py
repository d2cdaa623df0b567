"""Whether every request ended once, and right: in what clients were told and in Redis."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import redis

from benchmarks.chaos.clients import read_told
from benchmarks.chaos.harness import Disturbed, Outcomes
from benchmarks.chaos.workload import Part
from queue_api.store.keys import RunKeys
from queue_api.store.run_store import read_entries
from queue_api.wire.schemas import ErrorDetail, GenerationResult

__all__ = ["Audit"]

SHOWN = 20


@dataclass
class Audit:
    """Collects what is wrong, and counts."""

    expected: Outcomes
    violations: list[str] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    num_results: int = 0
    told_again: int = 0
    """Results that a client was told once more, because it was killed and read again."""
    leftovers: Counter[str] = field(default_factory=Counter)
    """Keys without a time to live that are still in Redis."""
    used_bytes: int = 0

    def __call__(self, happened: Disturbed, connection: redis.Redis) -> None:
        """Look at everything."""
        for part in happened.parts:
            told = list(_told(part, happened.output(part)))
            if part.client == "rows":
                self._check_once(part, told)
            self._check_told(part, told)
            for run, rows in part.runs():
                self._check_redis(part, run, len(rows), connection)
        self._check_rest(connection)
        self.violations += happened.bad_drains

    def _wrong(self, words: str) -> None:
        self.violations.append(words)

    def _check_once(self, part: Part, told: list[tuple[str, GenerationResult]]) -> None:
        """The rows of a file: each is there once, whoever died while writing it."""
        for (run, index), count in Counter((run, r.index) for run, r in told).items():
            if count != 1:
                self._wrong(f"{part.name}: row {index} of {run} is {count} times in the output")

    def _check_told(self, part: Part, told: list[tuple[str, GenerationResult]]) -> None:
        """What a client was told is right, and stays so when it asks again."""
        first: dict[tuple[str, int], GenerationResult] = {}
        for run, result in told:
            key = (run, result.index)
            if key in first:
                self.told_again += 1
                if result != first[key]:
                    self._wrong(f"{part.name}: request {result.index} of {run} has two results")
                continue
            first[key] = result
            self._check_result(part, run, result)
        for run, rows in part.runs():
            missing = [index for index in range(len(rows)) if (run, index) not in first]
            if missing:
                self._wrong(f"{part.name}: {len(missing)} of {run} missing: {missing[:SHOWN]}")

    def _check_result(self, part: Part, run: str, result: GenerationResult) -> None:
        self.num_results += 1
        self.attempts[result.attempt] += 1
        self.finish_reasons[result.finish_reason.value] += 1
        expected = self.expected.get(run, [])
        if result.index >= len(expected):
            self._wrong(f"{part.name}: {run} has a result {result.index} that nobody asked for")
            return
        got = (result.finish_reason.value, result.text)
        if got != expected[result.index]:
            why = f" ({result.error.code}: {result.error.message})" if result.error else ""
            self._wrong(
                f"{part.name}: request {result.index} of {run}, attempt {result.attempt}, ended "
                f"with {got!r:.300}{why} and not with {expected[result.index]!r:.300}"
            )

    def _check_redis(self, part: Part, run: str, total: int, connection: redis.Redis) -> None:
        keys = RunKeys.of(run)
        done = int(connection.hget(keys.hash, "done") or 0)  # type: ignore[arg-type]
        bits = connection.bitcount(keys.done)
        if (done, bits) != (total, total):
            self._wrong(f"{run}: Redis counts {done} done and {bits} bits of {total}")
        if part.client == "rows":
            return  # its client trims the stream as it writes
        indexes = Counter(index for _, index, _ in read_entries(connection.xrange(keys.results)))
        if sorted(indexes) != list(range(total)) or indexes.total() != total:
            self._wrong(f"{run}: its stream has {indexes.total()} results for {total} requests")

    def _check_rest(self, connection: redis.Redis) -> None:
        """No job is left behind, and nothing that stays for ever."""
        for pattern in ("rq:queue:*", "rq:wip:*", "rq:failed:*"):
            for key in connection.scan_iter(pattern):
                kind = connection.type(key)
                size = connection.llen(key) if kind == b"list" else connection.zcard(key)
                self._wrong(f"{key.decode()} still holds {size} jobs")
        for key in connection.scan_iter(count=1000):
            if connection.ttl(key) == -1:
                self.leftovers[_pattern(key.decode())] += 1
        self.used_bytes = connection.info("memory")["used_memory"]


def _told(part: Part, path: Path) -> Iterator[tuple[str, GenerationResult]]:
    if part.client != "rows":
        yield from read_told(path)
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        usage = row["usage"] or {}
        yield (
            part.name,
            GenerationResult(
                id=str(row["id"]),
                index=row["row"],
                text=row["text"],
                finish_reason=row["finish_reason"],
                attempt=row["attempt"],
                error=ErrorDetail(code=row["error_code"], message=row["error"])
                if row["error"]
                else None,
                prompt_tokens=usage.get("prompt_tokens", 0),
            ),
        )


def _pattern(key: str) -> str:
    """The kind of a key: its parts without those that name one job, run or worker."""
    parts = key.split(":")
    return ":".join(parts[:2] if len(parts) > 2 else parts)
