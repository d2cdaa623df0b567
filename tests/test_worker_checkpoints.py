"""A long generation goes on where a dead worker left it, and comes to the same text."""

from __future__ import annotations

import asyncio
import re
import signal

from kits.worker_kit import QUEUE, SERVE, completed, submit, until
from rq import Queue

from queue_api.connection.connect import connect_async
from queue_api.store.jobs import GENERATE
from queue_api.store.scripts import Scripts
from queue_api.wire.errors import InvalidRequestError
from queue_api.wire.schemas import GenerationRequest
from workers.running.checkpoints import Checkpoints, Place
from workers.running.echo_engine import EchoEngine
from workers.running.engine_loop import Addition, EngineLoop
from workers.scripts import worker_scripts

LONG = "echo:tokens=1000,step_s=0.001"
PROMPT = " ".join(f"w{i}" for i in range(700))
TEXT = " ".join(f"w{i % 700}" for i in range(1000))

DIES_LATE = """
import os, signal, sys
import workers.worker

load_engine = workers.worker.load_engine

def load_mortal(settings):
    engine = load_engine(settings)
    step = engine.step

    def mortal_step():
        ended = step()
        made = [len(tokens) for tokens in engine.progress().values()]
        if len(made) == 2 and min(made) >= 900:
            print("killed at token", max(made), file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return ended

    engine.step = mortal_step
    return engine

workers.worker.load_engine = load_mortal
"""


def tokens_kept(connection) -> int:
    keys = list(connection.scan_iter("batchmill:*:partial:*"))
    return connection.strlen(keys[0]) // 4 if keys else 0


def tokens_resumed(worker) -> int:
    found = re.findall(r"request id-0 goes on behind (\d+) tokens", worker.said())
    return int(found[-1]) if found else 0


def test_a_text_goes_on_behind_what_a_killed_worker_kept(connection, start_worker):
    settings = {"lease_s": 1, "checkpoint_tokens": 64}
    victim = start_worker(LONG, **settings)
    submit(connection, "run", [PROMPT])
    kept = until(lambda: (n := tokens_kept(connection)) > 400 and n)
    victim.send(signal.SIGKILL)
    heir = start_worker(LONG, **settings)
    (result,) = completed(connection, "run", 1)
    assert (result.text, result.completion_tokens, result.attempt) == (TEXT, 1000, 2)
    assert tokens_resumed(heir) >= kept
    until(lambda: tokens_kept(connection) == 0)


def test_a_drain_loses_no_token(connection, start_worker):
    first = start_worker(LONG, drain_grace_s=0)
    submit(connection, "run", [PROMPT])
    until(lambda: tokens_kept(connection) > 0)
    first.send(signal.SIGTERM)
    assert first.wait() == 0
    kept = tokens_kept(connection)
    heir = start_worker(LONG)
    (result,) = completed(connection, "run", 1)
    assert (result.text, result.attempt) == (TEXT, 1)
    assert tokens_resumed(heir) == kept


def test_a_text_begun_by_another_model_is_left_alone(connection, start_worker):
    connection.setrange("batchmill:{run}:partial:0:0123456789ab", 0, b"\1\0\0\0")
    submit(connection, "run", ["a b c"])
    connection.hincrby("rq:job:run-0", "claims", 1)
    worker = start_worker("echo:tokens=3")
    assert completed(connection, "run", 1)[0].text == "a b c"
    assert tokens_resumed(worker) == 0


def test_the_models_text_is_that_of_an_undisturbed_run(connection, start_worker):
    queue = Queue(QUEUE, connection=connection, serializer="json")
    settings = {"lease_s": 1, "checkpoint_tokens": 8, "num_threads": 1}
    sampling = {"max_tokens": 1000, "temperature": 1.0, "seed": 7, "ignore_eos": True}
    victim = start_worker("demo", **settings)
    undisturbed = queue.enqueue(GENERATE, "What is 3 plus 4?", **sampling)
    until(lambda: undisturbed.get_status() == "finished")
    disturbed = queue.enqueue(GENERATE, "What is 3 plus 4?", **sampling)
    until(lambda: tokens_kept(connection) > 50)
    victim.send(signal.SIGKILL)
    start_worker("demo", **settings)
    until(lambda: disturbed.get_status() == "finished")
    text = undisturbed.return_value()["text"]
    assert len(text) > 100
    assert disturbed.return_value()["text"] == text
    assert disturbed.return_value()["attempt"] == 2


def test_killed_at_token_900_of_1000_at_most_an_interval_is_computed_again(
    connection, start_worker
):
    """The figures of docs/reliability.md, for a greedy and a seeded text side by side."""
    queue = Queue(QUEUE, connection=connection, serializer="json")
    settings = {"lease_s": 1, "checkpoint_tokens": 64, "num_threads": 1}
    fields = {"max_tokens": 1000, "ignore_eos": True}
    kinds = {"greedy": {}, "seeded": {"temperature": 1.0, "seed": 7}}
    disturbed = {
        kind: queue.enqueue(GENERATE, "7 + 4?", job_id=kind, **fields, **more)
        for kind, more in kinds.items()
    }
    victim = start_worker("demo", script=DIES_LATE + SERVE, **settings)
    assert victim.wait() == -signal.SIGKILL
    heir = start_worker("demo", **settings)
    until(lambda: all(job.get_status() == "finished" for job in disturbed.values()))
    killed_at = int(re.findall(r"killed at token (\d+)", heir.said())[0])
    behind = dict(re.findall(r"request (\w+) goes on behind (\d+) tokens", heir.said()))
    assert behind.keys() == kinds.keys()
    again = {kind: killed_at - int(tokens) for kind, tokens in behind.items()}
    assert 0 <= min(again.values()) <= max(again.values()) <= settings["checkpoint_tokens"], again
    undisturbed = {
        kind: queue.enqueue(GENERATE, "7 + 4?", **fields, **more) for kind, more in kinds.items()
    }
    until(lambda: all(job.get_status() == "finished" for job in undisturbed.values()))
    for kind, job in disturbed.items():
        value = job.return_value()
        assert (value["completion_tokens"], value["attempt"]) == (1000, 2)
        assert value["text"] == undisturbed[kind].return_value()["text"]
    print(f"killed at token {killed_at}; computed again: {again}")


def test_a_late_checkpoint_leaves_no_gap(server, connection):
    place = Place("run", 0)

    async def late() -> list[int]:
        client = connect_async(server.url)
        checkpoints = Checkpoints(
            client, Scripts(client, worker_scripts()), every_tokens=2, model="m"
        )
        await checkpoints.save({place: range(10)})
        await client.flushdb()  # somebody else finished the request, and its text is gone
        await checkpoints.save({place: range(20)})
        await checkpoints.save({place: range(21)})
        assert (await checkpoints.load([place]))[place] == list(range(21))
        await checkpoints.save({place: range(5, 11)})  # begun anew, by another's tokens
        assert (await checkpoints.load([place]))[place] == list(range(5, 11))
        await checkpoints.save({place: range(5, 26)})
        found = await checkpoints.load([place])
        await client.aclose()
        return found[place]

    assert asyncio.run(late()) == list(range(5, 26))


def test_a_partial_text_that_the_engine_refuses_is_no_fault_of_the_request():
    class Picky(EchoEngine):
        def add(self, key, request, *, generated=(), seed_key=None):
            if generated:
                raise InvalidRequestError("token 99 is outside the vocabulary")
            super().add(key, request, seed_key=seed_key)

    async def served() -> str:
        done = asyncio.get_running_loop().create_future()
        loop = EngineLoop(Picky(tokens=2))
        loop.start(done.set_result, lambda _: None, done.set_exception, steps_between=8)
        request = GenerationRequest(id="x", prompt="a b")
        loop.add([Addition("key", request, "x", generated=[99])])
        (completion,) = await done
        await loop.stop()
        return completion.text

    assert asyncio.run(served()) == "a b"
