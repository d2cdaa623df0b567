"""When a worker writes what its engine completed, and what becomes of a result it can't write."""

from __future__ import annotations

import asyncio
import contextlib

import redis.asyncio as aredis
from kits.worker_kit import SERVE, completed, num_done, submit

from queue_api.store.keys import RunKeys
from queue_api.store.scripts import Scripts
from queue_api.wire.schemas import FinishReason
from workers.running.engine_loop import Refusal
from workers.running.outcomes import Outcome
from workers.running.publisher import Publisher
from workers.scripts import worker_scripts

AN_HOUR = "import workers.running.publisher as p\np.{} = 3600\n"
CHUNKS_IN_AN_HOUR = AN_HOUR.format("GATHER_PARTS_S")
CHUNKS_IN_AN_HOUR += "import workers.running.engine_loop as e\ne.HAND_OVER_S = 3600\n"
ALL_IN_AN_HOUR = CHUNKS_IN_AN_HOUR + AN_HOUR.format("GATHER_S") + "e.HAND_OVER_SOON_S = 3600\n"


def num_script_calls(connection) -> int:
    return connection.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)


def test_while_the_engine_has_more_to_do_many_steps_are_written_together(connection, start_worker):
    start_worker("echo:tokens=1,step_s=0.01,max_num_seqs=1")
    submit(connection, "warm", ["a"])
    completed(connection, "warm", 1)
    before = num_script_calls(connection)
    submit(connection, "run", [f"w{i}" for i in range(100)], chunk_size=100)
    completed(connection, "run", 100)
    assert num_script_calls(connection) - before < 50


def test_a_result_does_not_wait_when_the_engine_runs_empty(connection, start_worker):
    start_worker(script=ALL_IN_AN_HOUR + SERVE)
    for run in ("first", "second"):
        submit(connection, run, ["a b"])
        assert completed(connection, run, 1)[0].ok


def test_the_end_of_a_job_of_one_does_not_wait_for_other_jobs(connection, start_worker):
    start_worker("echo:tokens=1000,step_s=0.01", script=CHUNKS_IN_AN_HOUR + SERVE)
    submit(connection, "before", ["a b"], max_tokens=1)
    completed(connection, "before", 1)
    submit(connection, "long", ["a b"] * 2)
    submit(connection, "short", ["a b"] * 4, max_tokens=3, chunk_size=1)
    assert len(completed(connection, "short", 4)) == 4
    assert num_done(connection, "long") == 0


def test_a_result_that_cannot_be_written_as_json_ends_as_an_error_of_its_own(server, connection):
    connection.hset(RunKeys.of("run").hash, mapping={"total": 2})

    def outcome(index: int, text: str) -> Outcome:
        completion = Refusal("key", None, text=text, finish_reason=FinishReason.STOP)
        return Outcome("run", index, f"id-{index}", completion, None, None, 0.0, {})

    async def publish() -> None:
        async with aredis.Redis.from_url(server.url) as client:
            publisher = Publisher(client, Scripts(client, worker_scripts()), None, run_ttl_s=60)
            for index, text in enumerate(["half a pair \ud800", "good"]):
                publisher.add_result("run", outcome(index, text))
            task = asyncio.create_task(publisher.run(None, None))
            await asyncio.wait_for(publisher.flushed(), 20)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(publish())
    bad, good = completed(connection, "run", 2)
    assert (bad.id, bad.finish_reason, bad.error.code) == ("id-0", "error", "internal_error")
    assert (good.text, good.ok) == ("good", True)
