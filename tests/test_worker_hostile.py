"""Whatever stands in Redis: nothing of it runs, nothing dies of it, and each ends with a reason."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import random
import socket
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
from kits.worker_kit import QUEUE, completed, num_done, results, status, submit, until
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry, StartedJobRegistry
from rq.utils import now, utcformat

from queue_api.connection.connect import connect_async
from queue_api.store.jobs import GENERATE, MAX_PAYLOAD_BYTES, JobPayloadError, decode_chunk
from queue_api.store.keys import RunKeys
from queue_api.store.scripts import Scripts
from workers.leases import MOST_LOOKS_PER_CLAIM, Leases
from workers.scripts import worker_scripts

FUZZ_JOBS = 1000
GOOD = {"prompt": "a b", "max_tokens": 2}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def push(connection, job_id: str, data: bytes | None, **fields: Any) -> str:
    """Write a job without RQ's help."""
    mapping = {"status": "queued", "origin": QUEUE, "enqueued_at": utcformat(now()), **fields}
    mapping |= {} if data is None else {"data": data}
    connection.hset(f"rq:job:{job_id}", mapping=mapping)
    connection.sadd("rq:queues", f"rq:queue:{QUEUE}")
    connection.rpush(f"rq:queue:{QUEUE}", job_id)
    return job_id


def packed(*parts: Any) -> bytes:
    return zlib.compress(json.dumps(parts).encode())


def ours(**kwargs: Any) -> bytes:
    return packed(GENERATE, None, [], kwargs)


def serve_all(connection, start_worker) -> None:
    """Run a worker until the queue is empty; it has to be alive and well afterwards."""
    worker = start_worker()
    until(lambda: connection.llen(f"rq:queue:{QUEUE}") == 0)
    until(lambda: connection.zcard(f"rq:wip:{QUEUE}") == 0)
    last = Queue(QUEUE, connection=connection, serializer="json").enqueue(GENERATE, **GOOD)
    until(lambda: last.get_status() == "finished")
    assert last.return_value()["text"] == "a b"
    assert worker.process.poll() is None
    for cry in ("CRITICAL", "Exception in callback", "never retrieved"):
        assert cry not in worker.said(), worker.said()


PAYLOADS = {
    "none": None,
    "empty": b"",
    "text": b"hello",
    "bomb": zlib.compress(b"0" * (MAX_PAYLOAD_BYTES + 1)),
    "deep": zlib.compress(b"[" * 1_000_000),
    "deep-args": zlib.compress(b'["batchmill.generate",null,[],' + b"[" * 100_000),
    "number": zlib.compress(b"1" * 100_000),
    "nan": zlib.compress(b"NaN"),
    "null": packed(None, None, None, None),
    "short": packed(GENERATE, None),
    "func-list": packed(["os", "system"], None, ["true"], {}),
    "func-dict": packed({"a": 1}, None, ["true"], {}),
    "os-system": packed("os.system", None, ["touch {marker}"], {}),
    "instance": packed("system", "os", ["touch {marker}"], {}),
    "args-dict": packed(GENERATE, None, {"a": 1}, {}),
    "kwargs-list": packed(GENERATE, None, [], [1]),
    "two-args": packed(GENERATE, None, ["a", "b"], {}),
    "no-requests": ours(requests=[]),
    "many-requests": ours(requests=[[i, GOOD] for i in range(2000)]),
    "requests-text": ours(requests="abc"),
    "requests-flat": ours(requests=[GOOD]),
    "index-bool": ours(requests=[[True, GOOD]]),
    "index-text": ours(requests=[["0", GOOD]]),
    "index-negative": ours(requests=[[-1, GOOD]]),
    "index-huge": ours(requests=[[2**40, GOOD]]),
    "run-number": ours(run=7, requests=[[0, GOOD]]),
    "run-braces": ours(run="a}:b", requests=[[0, GOOD]]),
    "run-long": ours(run="a" * 1000, requests=[[0, GOOD]]),
}


def test_unreadable_payloads_end_in_the_dead_letter_with_a_reason(
    connection, start_worker, tmp_path
):
    marker = tmp_path / "ran"
    PAYLOADS["pickle"] = pickle.dumps(Touch(marker))
    PAYLOADS["pickle-packed"] = zlib.compress(pickle.dumps(Touch(marker)))
    for name, data in PAYLOADS.items():
        push(connection, name, data and data.replace(b"{marker}", str(marker).encode()))
    serve_all(connection, start_worker)
    failed = FailedJobRegistry(QUEUE, connection, serializer="json").get_job_ids(cleanup=False)
    assert set(failed) == set(PAYLOADS)
    for job_id in PAYLOADS.keys() - {"none"}:
        assert Job.fetch(job_id, connection, serializer="json").latest_result().exc_string
    assert not marker.exists()


REQUESTS: dict[str, Any] = {
    "null": None,
    "number": 5,
    "list": [1, 2],
    "empty": {},
    "prompt-number": {"id": "x", "prompt": 5},
    "prompt-float-tokens": {"id": "x", "prompt": [1.5]},
    "prompt-texts": {"id": "x", "prompt": ["a"] * 100_000},
    "prompt-negative-token": {"id": "x", "prompt": [-1]},
    "prompt-surrogate": {"id": "x", "prompt": "\ud800"},
    "both": {"id": "x", "prompt": "a", "messages": [{"role": "user", "content": "b"}]},
    "id-number": {"id": 5, "prompt": "a"},
    "id-surrogate": {"id": "\ud800", "prompt": "a"},
    "id-long": {"id": "x" * 10_000, "prompt": "a"},
    "metadata-list": {"id": "x", "prompt": "a", "metadata": [1]},
    "metadata-surrogate": {"id": "x", "prompt": "a", "metadata": {"k": "\ud800"}},
    "unknown": {"id": "x", "prompt": "a", "\ud800": 1},
    "unknown-long": {"id": "x", "prompt": "a", "f" * 100_000: 1},
    "unknown-many": {"id": "x", "prompt": "a", **{f"f{i}": i for i in range(100_000)}},
    "tokens-huge": {"id": "x", "prompt": "a", "sampling": {"max_tokens": 10**400}},
    "tokens-text": {"id": "x", "prompt": "a", "sampling": {"max_tokens": "5"}},
    "temperature-nan": {"id": "x", "prompt": "a", "sampling": {"temperature": float("nan")}},
    "temperature-inf": {"id": "x", "prompt": "a", "sampling": {"temperature": float("inf")}},
    "seed-negative": {"id": "x", "prompt": "a", "sampling": {"seed": -1}},
    "stop-empty": {"id": "x", "prompt": "a", "sampling": {"stop": [""]}},
    "stop-many": {"id": "x", "prompt": "a", "sampling": {"stop": ["s"] * 1000}},
    "messages-empty": {"id": "x", "messages": []},
    "role-number": {"id": "x", "messages": [{"role": 1, "content": "a"}]},
    "metadata-nan": {"id": "x", "prompt": "a", "metadata": {"k": float("nan")}},
    "timeout-negative": {"id": "x", "prompt": "a", "timeout_s": -1},
}
HARMLESS: dict[str, Any] = {
    "controls": {
        "id": "\x00\x1b[31m\r\n",
        "prompt": "\x00 \x1b[2J",
        "metadata": {"\x00": "\u202e"},
    },
    "astral": {"id": "\U0001f600", "prompt": "\U0001f600 \u0301"},
}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


MANY = {
    "lists": b'[0,{"id":"a","prompt":"x","metadata":{"a":[' + b"[]," * 2_000_000 + b"0]}}]",
    "items": b"[0,1]," * 2_000_000 + b"[0,1]",
    "numbers": b'[0,{"id":"a","prompt":[' + b"1," * 8_000_000 + b"0]}]",
    "fields": b"[0,{" + b",".join(b'"%d":0' % i for i in range(3_000_000)) + b"}]",
}


@pytest.mark.parametrize("what", MANY)
def test_a_small_job_of_millions_of_values_is_refused_unread(what):
    body = b'["batchmill.generate",null,[],{"requests":[' + MANY[what] + b"]}]"
    assert len(body) < MAX_PAYLOAD_BYTES
    # parsing it would make objects by the million: none is made
    tracemalloc.start()
    try:
        with pytest.raises(JobPayloadError, match="the limit is"):
            decode_chunk("job", zlib.compress(body, 9))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(body)


def test_a_job_of_long_prompts_is_read():
    ids = list(range(100, 50_100))
    requests = [[i, {"id": str(i), "prompt": ids}] for i in range(32)]
    chunk = decode_chunk("job", packed(GENERATE, None, [], {"requests": requests}))
    assert [len(item["prompt"]) for _, item in chunk.items] == [50_000] * 32


def test_bad_requests_are_error_results_and_harmless_ones_are_served(connection, start_worker):
    bad = {**REQUESTS, "metadata-deep": {"id": "x", "prompt": "a", "metadata": {"k": nested(900)}}}
    items = [*bad.values(), *HARMLESS.values()]
    connection.hset(RunKeys.of("run").hash, mapping={"queue": QUEUE, "total": len(items)})
    push(connection, "run-0", ours(run="run", requests=[[i, r] for i, r in enumerate(items)]))
    serve_all(connection, start_worker)
    found = {result.index: result for result in results(connection, "run")}
    assert sorted(found) == list(range(len(items)))
    verdicts = {name: found[i] for i, name in enumerate([*bad, *HARMLESS])}
    assert {name for name, result in verdicts.items() if result.ok} == set(HARMLESS)
    for name in bad:
        assert verdicts[name].error.code == "invalid_request", name
        assert 0 < len(verdicts[name].error.message) < 2000, name
    assert verdicts["controls"].metadata == {"\x00": "\u202e"}


FIELDS: dict[str, Any] = {
    "timeout": "abc",
    "result_ttl": "soon",
    "result_ttl#": "1e300",
    "result_ttl##": "1.5",
    "failure_ttl": "never",
    "ttl": "x",
    "retries_left": "many",
    "retry_intervals": "[",
    "batch_size": "-7",
    "batch_size#": "nan",
    "batch_size##": "1e999",
    "claims": "x",
    "claims#": "1e999",
    "released": "-5",
    "deaths": "nan",
    "deaths#": "1e999",
    "enqueued_at": "yesterday",
    "enqueued_at#": b"\xff\xfe",
    "created_at": "\x00",
    "origin": "elsewhere",
    "dependency_ids": "{",
    "group_id": "nobody",
    "meta": "{",
    "webhooks": "{",
    "repeats_left": "x",
    "rate_limit_key": "nobody",
    "enqueue_at_front": "x",
    "\udcff": "x",
}


def test_odd_fields_of_a_job_hurt_nobody(connection, start_worker):
    """A readable payload is served or fails alone, whatever stands beside it in the hash."""
    for number, (name, value) in enumerate(FIELDS.items()):
        field = name.strip("#").encode("utf-8", "surrogateescape")
        push(connection, f"good-{number}", ours(requests=[[0, {"id": "x", "prompt": "a b"}]]))
        connection.hset(f"rq:job:good-{number}", field, value)
        push(connection, f"bad-{number}", b"")
        connection.hset(f"rq:job:bad-{number}", field, value)
    serve_all(connection, start_worker)
    for number in range(len(FIELDS)):
        assert connection.hget(f"rq:job:good-{number}", "status") in (b"finished", b"failed")
        assert connection.hget(f"rq:job:bad-{number}", "status") == b"failed"


def test_other_peoples_keys_hurt_nobody(connection, start_worker):
    connection.set("rq:job:a-string", "x")
    connection.rpush(
        f"rq:queue:{QUEUE}", "a-string", "a:colon", "", "sp ace", "x" * 100_000, b"\xff"
    )
    for name in ("hash", "results", "done"):
        run = f"wrong-{name}"
        for other in RunKeys.of(run)._fields:
            connection.set(getattr(RunKeys.of(run), other), "x") if other == name else None
        if name != "hash":
            connection.hset(RunKeys.of(run).hash, "queue", QUEUE)
        push(connection, run, ours(run=run, requests=[[0, {"id": "x", "prompt": "a"}]]))
    connection.hset(RunKeys.of("right").hash, "queue", QUEUE)
    push(connection, "right", ours(run="right", requests=[[0, {"id": "x", "prompt": "a"}]]))
    serve_all(connection, start_worker)
    assert num_done(connection, "right") == 1


def test_callbacks_and_webhooks_named_in_a_job_are_inert(connection, start_worker, tmp_path):
    marker = tmp_path / "ran"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        hooks = [{"url": url, "job_status": state} for state in ("finished", "failed")]
        callbacks = {
            f"{kind}_callback_name": "pathlib.Path.touch"
            for kind in ("success", "failure", "stopped")
        }
        fields = {**callbacks, "webhooks": json.dumps(hooks), "description": str(marker)}
        push(connection, "good", ours(requests=[[0, {"id": "x", "prompt": "a"}]]), **fields)
        push(connection, "bad", packed("os.system", None, [f"touch {marker}"], {}), **fields)
        serve_all(connection, start_worker)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert (status(connection, "good"), status(connection, "bad")) == ("finished", "failed")
    assert not marker.exists()


def test_garbled_commands_are_ignored(connection, start_worker):
    start_worker(name="milly")
    for message in (b"", b"{", b"[]", b'{"command": 5}', b'{"command": "stop-job"}', b"\xff"):
        connection.publish("rq:pubsub:milly", message)
    serve_all(connection, start_worker)


def test_fuzzed_payloads_hurt_nobody(connection, start_worker):
    """FUZZ_JOBS jobs of damaged or random payloads, from one seed."""
    draw = random.Random(20)
    for number in range(FUZZ_JOBS):
        push(connection, f"fuzz-{number}", _fuzzed(draw), batch_size=draw.choice([1, 8, "x"]))
    serve_all(connection, start_worker)
    registry = StartedJobRegistry(QUEUE, connection, serializer="json")
    assert registry.get_job_ids(cleanup=False) == []
    statuses = {connection.hget(f"rq:job:fuzz-{i}", "status") for i in range(FUZZ_JOBS)}
    assert statuses <= {b"finished", b"failed", None}


def _fuzzed(draw: random.Random) -> bytes:
    good = {"id": "x", "prompt": "a b", "sampling": {"max_tokens": 2}, "metadata": {"k": [1]}}
    kwargs = {"requests": [[0, good], [1, good]]} if draw.random() < 0.7 else GOOD
    kind = draw.randrange(3)
    if kind == 0:
        return zlib.compress(_damaged(draw, json.dumps([GENERATE, None, [], kwargs]).encode()))
    if kind == 1:
        return _damaged(draw, packed(GENERATE, None, [], kwargs))
    return packed(GENERATE, None, [], {"requests": [[0, _random_json(draw, 4)]]})


def _damaged(draw: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(damaged))
        damaged[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
    return bytes(damaged)


def _random_json(draw: random.Random, depth: int) -> Any:
    fields = ["id", "prompt", "messages", "sampling", "max_tokens", "stop", "metadata", "role"]
    leaves = [None, True, -1, 10**30, 0.5, "", "a b", "\ud800", float("nan")]
    kind = draw.randrange(3) if depth else 0
    if kind == 1:
        return [_random_json(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 2:
        names = draw.sample(fields, draw.randrange(5))
        return {name: _random_json(draw, depth - 1) for name in names}
    return draw.choice(leaves)


def test_keys_of_another_type_beside_jobs_disarm_no_queue(connection, start_worker):
    """Where RQ's registries should be, and amid the work: claims, leases and takeovers go on."""
    for key in ("rq:queue:odd", "rq:wip:odder", f"rq:scheduled:{QUEUE}", "rq:executions:run-1"):
        connection.set(key, "somebody's")
    connection.rpush("rq:queue:odder", "kept")
    jobs = submit(connection, "run", ["a b"] * 6, chunk_size=1)
    # one word for each of two steps of half a minute, or killed amid the first
    model = "echo:tokens=1,step_s=30"
    victim = start_worker(model, lease_s=1, queues=f"odd,odder,{QUEUE}", name="victim")
    until(lambda: {status(connection, job) for job in jobs} == {"started"})
    connection.set("rq:job:run-0", "somebody's")
    leases = "rq:wip:batchmill"
    first = dict(connection.zrange(leases, 0, -1, withscores=True))
    # renewed, all but the one that is no job any more
    until(
        lambda: (
            connection.zcard(leases) == 5
            and all(
                until_at > first[name]
                for name, until_at in connection.zrange(leases, 0, -1, withscores=True)
            )
        )
    )
    victim.kill()
    start_worker("echo:tokens=1", lease_s=1, queues=f"odd,odder,{QUEUE}")
    # the first, whose job somebody took away, may have ended as cancelled before the kill
    until(lambda: {r.index for r in results(connection, "run")} >= {1, 2, 3, 4, 5})
    made = [r for r in results(connection, "run") if r.index]
    assert all(r.ok for r in made)
    assert len(made) == 5
    assert connection.get("rq:queue:odd") == b"somebody's"
    assert connection.lrange("rq:queue:odder", 0, -1) == [b"kept"]


def test_a_job_whose_key_is_taken_amid_its_work_costs_no_worker(connection, start_worker):
    """It ends before a heartbeat finds that there is no such job."""
    jobs = submit(connection, "run", ["a b"] * 2, chunk_size=1)
    worker = start_worker("echo:tokens=1,step_s=1", lease_s=60)
    until(lambda: {status(connection, job) for job in jobs} == {"started"})
    connection.set("rq:job:run-0", "somebody's")
    completed(connection, "run", 2)
    until(lambda: connection.zcard(f"rq:wip:{QUEUE}") == 0)
    submit(connection, "after", ["a b"])
    completed(connection, "after", 1)
    assert "CRITICAL" not in worker.said()
    assert (connection.get("rq:job:run-0"), connection.ttl("rq:job:run-0")) == (b"somebody's", -1)


def test_a_queue_of_things_that_are_no_jobs_is_looked_through_in_parts(
    server, connection, start_worker
):
    connection.rpush(f"rq:queue:{QUEUE}", *(f"gone-{i}" for i in range(2_500)))
    submit(connection, "run", ["a b"] * 3)

    async def claim():
        client = connect_async(server.url)
        leases = Leases(
            client,
            Scripts(client, worker_scripts()),
            worker_name="w",
            worker_key="rq:worker:w",
            executions_key="rq:worker:w:executions",
            queues=[QUEUE],
            lease_s=30,
            alone_after=2,
            worker_ttl_s=60,
            result_ttl_s=60,
        )
        try:
            return await leases.claim(8)
        finally:
            await client.aclose()

    before = connection.llen(f"rq:queue:{QUEUE}")
    got = asyncio.run(claim())
    assert (got.leases, got.may_be_more) == ([], True)
    assert before - connection.llen(f"rq:queue:{QUEUE}") == MOST_LOOKS_PER_CLAIM
    # a worker goes on by itself until it has come to the jobs
    start_worker("echo:tokens=1")
    until(lambda: num_done(connection, "run") == 3)
