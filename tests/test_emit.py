"""What emit.lua appends to a run's stream, and how it is read back."""

from __future__ import annotations

from typing import Any

import pytest

from queue_api.store.keys import RunKeys
from queue_api.store.run_store import read_entries
from queue_api.store.runs import RunStatus, emit_args
from queue_api.store.scripts import load_script
from queue_api.wire.schemas import FinishReason, GenerationResult

pytestmark = pytest.mark.servers

KEYS = RunKeys.of("run")


def result(index: int, text: str = "text") -> GenerationResult:
    reason = FinishReason.STOP if index % 2 else FinishReason.LENGTH
    counts: dict[str, Any] = {"prompt_tokens": 3, "completion_tokens": 2}
    return GenerationResult(id=f"{index}", index=index, text=text, finish_reason=reason, **counts)


@pytest.fixture
def emit(connection):
    connection.hset(KEYS.hash, mapping={"queue": "q", "total": 1000})
    script = connection.register_script(load_script("emit"))
    return lambda results: script(KEYS, emit_args(results))


def indexes(connection) -> list[int]:
    return [index for _, index, _ in read_entries(connection.xrange(KEYS.results))]


def test_of_results_that_overlap_each_requests_first_is_kept_and_counted(connection, emit):
    assert emit([result(i) for i in range(40)]) == 40
    assert emit([result(i, "other") for i in range(20, 60)]) == 20
    assert emit([result(70), result(70, "other")]) == 1
    assert indexes(connection) == [*range(60), 70]
    assert b"other" not in dict(connection.xrange(KEYS.results)[-1][1])[b"70"]
    status = RunStatus.from_hash("run", connection.hgetall(KEYS.hash))
    assert (status.done, status.prompt_tokens, status.completion_tokens) == (61, 183, 122)
    assert status.finish_reasons == {"length": 31, "stop": 30}
    assert status.suppressed == 21


def test_an_entry_of_the_stream_stays_small(connection, emit):
    assert emit([result(i) for i in range(200)]) == 200
    assert [len(fields) for _, fields in connection.xrange(KEYS.results)] == [64, 64, 64, 8]
    emit([result(200 + i, "x" * 50_000) for i in range(3)])
    assert [len(fields) for _, fields in connection.xrange(KEYS.results)][4:] == [2, 1]


def test_results_that_were_written_one_to_an_entry_are_read(connection):
    connection.xadd(KEYS.results, {"index": 7, "result": "{}"})
    connection.xadd(KEYS.results, {"anything": "else"})
    connection.xadd(KEYS.results, {"8": "{}", "9": "{}"})
    assert indexes(connection) == [7, 8, 9]


def test_results_of_an_unknown_run_are_dropped(connection):
    script = connection.register_script(load_script("emit"))
    assert script(KEYS, emit_args([result(0)])) == -1
    assert not connection.exists(*KEYS)
