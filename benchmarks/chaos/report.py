"""What happened, in words and as numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.chaos.audit import SHOWN, Audit
from benchmarks.chaos.harness import ChaosSettings, Disturbed

__all__ = ["Report", "report"]


@dataclass(frozen=True)
class Report:
    text: str
    numbers: dict[str, Any]


def report(settings: ChaosSettings, happened: Disturbed, audit: Audit) -> Report:
    """Everything that was counted."""
    numbers = {
        "settings": asdict(settings),
        "kills": happened.kills,
        "faults": {kind.value: count for kind, count in sorted(happened.faults.items())},
        "requests": settings.num_requests,
        "results": audit.num_results,
        "finish_reasons": dict(audit.finish_reasons),
        "attempts": dict(sorted(audit.attempts.items())),
        "duplicates_suppressed": happened.duplicates_suppressed,
        "told_again": audit.told_again,
        "process_starts": dict(happened.starts),
        "keys_without_ttl": dict(audit.leftovers),
        "elapsed_s": round(happened.elapsed_s, 1),
        "violations": audit.violations,
    }
    return Report("\n".join(_lines(numbers)), numbers)


def _lines(numbers: dict[str, Any]) -> list[str]:
    settings = numbers["settings"]
    lines = [
        f"seed {settings['seed']}: {numbers['kills']} kills, {numbers['requests']:,} requests "
        f"({settings['num_demo']} to the demo model), {numbers['elapsed_s']} s",
        *(f"  {count:4} x {kind}" for kind, count in numbers["faults"].items()),
        f"results: {numbers['results']:,}, {_counts(numbers['finish_reasons'])}",
        f"attempts: {_counts(numbers['attempts'])}",
        f"duplicates suppressed: {numbers['duplicates_suppressed']:,}; told again to a client "
        f"that was killed: {numbers['told_again']:,}",
        f"process starts: {_counts(numbers['process_starts'])}",
        f"keys in Redis without a time to live: {_counts(numbers['keys_without_ttl']) or 'none'}",
    ]
    wrong = numbers["violations"]
    if not wrong:
        return [*lines, "each request has exactly one result, the text of an undisturbed run"]
    lines.append(f"VIOLATIONS: {len(wrong)}")
    lines += [f"  {words}" for words in wrong[:SHOWN]]
    return lines


def _counts(counts: dict[Any, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())
