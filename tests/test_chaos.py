"""Whatever is killed, and when: each request ends once, with the text of an undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import redis

from benchmarks.chaos.audit import Audit
from benchmarks.chaos.faults import KILLS, OF_REDIS, Kind, draw_faults
from benchmarks.chaos.harness import ChaosSettings, Disturbed, disturb, expected_outcomes
from benchmarks.chaos.report import report
from benchmarks.chaos.workload import ECHO_QUEUE, Part, make_parts
from queue_api.store.keys import RunKeys
from queue_api.store.runs import emit_args
from queue_api.store.scripts import load_script
from queue_api.wire.schemas import FinishReason, GenerationResult

SHORT = ChaosSettings(seed=1, num_requests=1000, num_demo=12, kills=5, demo_workers=1)


@pytest.mark.timeout(600)
def test_each_request_ends_once_whatever_is_killed(tmp_path: Path) -> None:
    parts = make_parts(SHORT.seed, SHORT.num_requests, SHORT.num_demo)
    audit = Audit(expected_outcomes(parts, tmp_path))
    happened = disturb(SHORT, parts, tmp_path, audit)
    found = report(SHORT, happened, audit)
    assert not audit.violations, found.text
    assert audit.num_results == SHORT.num_requests
    assert happened.kills >= SHORT.kills
    assert {Kind.KILL_WORKER, Kind.KILL_REDIS, Kind.STOP_WORKER, *OF_REDIS} <= set(happened.faults)


def test_the_seed_alone_decides() -> None:
    assert draw_faults(7, 50, 2.0) == draw_faults(7, 50, 2.0) != draw_faults(8, 50, 2.0)
    assert make_parts(7, 500, 20) == make_parts(7, 500, 20) != make_parts(8, 500, 20)
    kinds = [fault.kind for fault in draw_faults(7, 50, 2.0)]
    assert sum(kind in KILLS for kind in kinds) == 50
    assert set(kinds) == set(Kind)
    assert sum(len(part.rows) for part in make_parts(7, 500, 20)) == 500


@pytest.fixture
def whole(tmp_path: Path, connection: redis.Redis) -> tuple[Disturbed, Audit]:
    """A run of three requests that nothing is wrong with."""
    rows = [{"id": f"id-{i}", "prompt": f"word{i}"} for i in range(3)]
    part = Part("waves", "waves", ECHO_QUEUE, rows)
    happened = Disturbed(tmp_path, [part])
    results = [answer(i) for i in range(3)]
    connection.hset(RunKeys.of("waves-0").hash, "queue", ECHO_QUEUE)
    emit = connection.register_script(load_script("emit"))
    emit(RunKeys.of("waves-0"), emit_args(results))
    happened.output(part).write_text("".join(line(result) for result in results))
    return happened, Audit({"waves-0": [("length", f"word{i}") for i in range(3)]})


def answer(index: int, text: str | None = None) -> GenerationResult:
    return GenerationResult(
        id=f"id-{index}",
        run="waves-0",
        index=index,
        text=text or f"word{index}",
        finish_reason=FinishReason.LENGTH,
    )


def line(result: GenerationResult) -> str:
    return json.dumps(["waves-0", result.model_dump(mode="json")]) + "\n"


def test_the_audit_finds_nothing_where_nothing_is_wrong(whole, connection) -> None:
    happened, audit = whole
    audit(happened, connection)
    assert audit.violations == []
    assert audit.num_results == 3


def test_the_audit_finds_what_is_missing_doubled_changed_or_left_behind(whole, connection) -> None:
    happened, audit = whole
    (part,) = happened.parts
    output = happened.output(part)
    as_it_was = output.read_text()

    def violations() -> str:
        again = Audit(audit.expected)
        again(happened, connection)
        return "\n".join(again.violations)

    output.write_text("".join(as_it_was.splitlines(keepends=True)[:2]))
    assert "1 of waves-0 missing: [2]" in violations()
    output.write_text(as_it_was + line(answer(1, "other")))
    assert "request 1 of waves-0 has two results" in violations()
    output.write_text(as_it_was.replace("word2", "other"))
    assert "'other'" in violations()
    output.write_text(as_it_was + line(replace_index(answer(0), 3)))
    assert "a result 3 that nobody asked for" in violations()
    output.write_text(as_it_was)
    connection.xadd(RunKeys.of("waves-0").results, {"index": 1, "result": "{}"})
    assert "4 results for 3 requests" in violations()
    connection.setbit(RunKeys.of("waves-0").done, 0, 0)
    assert "3 done and 2 bits of 3" in violations()
    connection.rpush("rq:queue:echo", "job")
    assert "rq:queue:echo still holds 1 jobs" in violations()


def replace_index(result: GenerationResult, index: int) -> GenerationResult:
    return result.model_copy(update={"index": index})
