"""What Redis says is read the same way on every server, in a script or not, by everyone."""

from __future__ import annotations

import asyncio
import functools
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis
import redis.asyncio as aredis
from kits.faults import PASSING
from kits.servers import KINDS, server_of
from kits.worker_kit import WorkerProcess, completed, submit, until, workers

from queue_api.client.client import Client
from queue_api.connection.child_process import child_environment, python_module
from queue_api.connection.connect import check_server, connect
from queue_api.connection.embedded import EmbeddedRedis
from queue_api.connection.failures import Failure, error_code, failure_of, friendly
from queue_api.connection.settings import QueueSettings
from queue_api.store.keys import RunKeys
from queue_api.wire.errors import RedisAuthError, RedisServerError
from queue_api.wire.schemas import GenerationResult

WRITE = "return redis.call('SET', KEYS[1], 'v')"
READ = "return redis.call('GET', KEYS[1])"
USER, PASSWORD = "somebody", "hush"


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(binary=server_of(request.param)) as running:
        yield running


# --- the table -----------------------------------------------------------------------------------


def raised_by(command: Callable[[], object]) -> Exception:
    with pytest.raises(redis.RedisError) as caught:
        command()
    return caught.value


def ways(client: redis.Redis) -> dict[str, Callable[[], object]]:
    """Writes that a server refuses, each as it is sent somewhere in batchmill or RQ."""

    def pipeline(transaction: bool) -> object:
        with client.pipeline(transaction=transaction) as pipe:
            pipe.set("key", "v")
            return pipe.execute()

    def in_place_of_a_reply() -> object:
        with client.pipeline(transaction=False) as pipe:
            pipe.eval(WRITE, 1, "key")
            (reply,) = pipe.execute(raise_on_error=False)
        raise reply

    def asyncio_pipeline(transaction: bool) -> None:
        async def write() -> None:
            other = aredis.Redis(connection_pool=pool)
            async with other, other.pipeline(transaction=transaction) as pipe:
                pipe.set("key", "v")
                pipe.eval(WRITE, 1, "key")
                await pipe.execute()

        given = client.connection_pool.connection_kwargs
        options = {k: v for k, v in given.items() if k in ("path", "username", "password")}
        pool = aredis.ConnectionPool(connection_class=aredis.UnixDomainSocketConnection, **options)
        asyncio.run(write())

    return {
        "outside": lambda: client.set("key", "v"),
        "in a script": lambda: client.eval(WRITE, 1, "key"),
        "in a pipeline": lambda: pipeline(transaction=False),
        "in a transaction": lambda: pipeline(transaction=True),
        "in place of a reply": in_place_of_a_reply,
        "in a pipeline of asyncio": lambda: asyncio_pipeline(transaction=False),
        "in a transaction of asyncio": lambda: asyncio_pipeline(transaction=True),
    }


@pytest.mark.parametrize("code", [code for code in PASSING if code != "NOSCRIPT"])
def test_what_passes_is_read_so_wherever_it_is_said(server, connection, code):
    plain = redis.Redis.from_url(server.url)  # one that doesn't leave a replica
    with PASSING[code](server, connection):
        if code == "MASTERDOWN":  # of a write it says READONLY, which is as true
            read = {"outside": lambda: plain.get("key"), "in": lambda: plain.eval(READ, 1, "key")}
            errors = {way: raised_by(command) for way, command in read.items()}
        else:
            errors = {way: raised_by(command) for way, command in ways(plain).items()}
    plain.close()
    assert {way: error_code(error) for way, error in errors.items()} == dict.fromkeys(errors, code)
    assert {failure_of(error) for error in errors.values()} == {Failure.PASSING}
    assert all(friendly(error, server.url).may_pass for error in errors.values())


def test_a_script_that_is_forgotten_or_killed_may_be_sent_again(server, connection):
    unknown = raised_by(lambda: connection.evalsha("0" * 40, 0))
    assert (error_code(unknown), failure_of(unknown)) == ("NOSCRIPT", Failure.PASSING)
    assert failure_of(redis.ResponseError("Script killed by user …")) is Failure.PASSING
    said = "Error running script (call to f_0): @user_script:1: Script killed by user with …"
    assert failure_of(redis.ResponseError(said)) is Failure.PASSING


def test_a_key_of_the_wrong_type_is_that_key_s_fault_alone(server, connection):
    connection.lpush("key", "x")
    append = {
        "outside": lambda: connection.append("key", "x"),
        "in a script": lambda: connection.eval(
            "return redis.call('APPEND', KEYS[1], 'x')", 1, "key"
        ),
    }

    def transaction() -> object:
        with connection.pipeline() as pipe:
            pipe.append("key", "x")
            return pipe.execute()

    errors = [raised_by(command) for command in (*append.values(), transaction)]
    assert [(error_code(e), failure_of(e)) for e in errors] == [("WRONGTYPE", Failure.KEY)] * 3


def test_what_a_user_may_not_do_is_never_tried_again(server, connection):
    acl = ["ACL", "SETUSER", USER, "on", f">{PASSWORD}", "~key*", "+@all", "-set"]
    connection.execute_command(*acl)
    client = redis.Redis.from_url(server.url.replace("unix://", f"unix://{USER}:{PASSWORD}@"))
    errors = {way: raised_by(command) for way, command in ways(client).items()}
    errors["a key outside"] = raised_by(lambda: client.get("other"))
    errors["a key in a script"] = raised_by(lambda: client.eval(READ, 1, "other"))
    client.close()
    assert {error_code(error) for error in errors.values()} == {"NOPERM"}
    assert {failure_of(error) for error in errors.values()} == {Failure.FATAL}
    assert isinstance(friendly(errors["in a script"], server.url), RedisAuthError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cluster_is_refused_by_worker_client_and_dataset_run(kind, tmp_path):
    socket = tmp_path / "redis.sock"
    command = [str(server_of(kind)), "--port", "0", "--unixsocket", str(socket)]
    command += ["--cluster-enabled", "yes", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"unix://{socket}"
    plain = redis.Redis.from_url(url)
    try:
        until(socket.exists)
        errors = [raised_by(command) for command in ways(plain).values()]
        assert {error_code(error) for error in errors} == {"CLUSTERDOWN"}
        assert {failure_of(error) for error in errors} == {Failure.FATAL}
        with pytest.raises(RedisServerError, match="part of a Cluster"):
            check_server(plain)
        with pytest.raises(RedisServerError, match="part of a Cluster"):
            asyncio.run(texts_of(Client(settings=QueueSettings(redis_url=url)), "run"))
        worker = WorkerProcess(url, tmp_path / "worker.log")
        assert worker.wait() != 0
        assert "part of a Cluster" in worker.said()
        job = dataset_run(url, tmp_path, 1)
        assert (job.wait(60), "part of a Cluster" in job.stderr.read()) == (2, True)
    finally:
        plain.close()
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("Command # 1 (HSET x -NOREPLICAS y) of pipeline caused error: WRONGTYPE x", "WRONGTYPE"),
        ("unknown command 'x', with args beginning with: -OOM ", "ERR"),
        ("value is not an integer or out of range", "ERR"),
        ("because of: MISCONF x", "ERR"),
    ],
)
def test_what_somebody_wrote_isn_t_taken_for_the_server_s_word(said, code):
    assert error_code(redis.ResponseError(said)) == code


def test_a_transaction_says_what_it_was_discarded_for():
    abort = redis.exceptions.ExecAbortError
    passing = abort("Transaction discarded because of: MISCONF Redis is configured to save")
    assert failure_of(passing) is Failure.PASSING
    fatal = abort("Transaction discarded because of previous errors.")
    assert failure_of(fatal) is Failure.FATAL


# --- what everyone does --------------------------------------------------------------------------


async def texts_of(client: Client, run: str) -> list[GenerationResult]:
    async with client:
        return [result async for result in client.run(run).results()]


def dataset_run(url: str, folder: Path, rows: int, name: str = "rows") -> subprocess.Popen[str]:
    """`batchmill run` with workers that are there already."""
    lines = [json.dumps({"prompt": f"row{i}", "max_tokens": 20}) for i in range(rows)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    files = [str(folder / f"{name}.jsonl"), "-o", str(folder / f"{name}.out.jsonl")]
    options = ["--workers", "0", "--queue", "batchmill", "--chunk-size", "4", "--run", name]
    return subprocess.Popen(
        python_module("batchmill", "run", *files, *options),
        env=child_environment({"BATCHMILL_REDIS_URL": url, "BATCHMILL_RECONCILE_S": "0.5"}),
        stderr=subprocess.PIPE,
        text=True,
    )


def done(connection: redis.Redis, *runs: str) -> int:
    with suppress(redis.RedisError):
        return sum(int(connection.hget(RunKeys.of(run).hash, "done") or 0) for run in runs)
    return 0


@pytest.mark.timeout(240)
def test_what_passes_costs_no_one_anything(server, connection, start_worker, tmp_path):
    """Each in turn, amid a client's run and a dataset run: no result is lost, or made twice."""
    model = "echo:tokens=20,step_s=0.02"
    worker = start_worker(model, max_num_seqs=16, capacity=32)
    total, each = 192, 15
    job = dataset_run(server.url, tmp_path, total)
    settings = QueueSettings(redis_url=server.url, chunk_size=4, reconcile_s=0.5)

    def is_done(number: int) -> bool:
        return done(connection, "run", "rows") >= number

    def provoke() -> None:
        for number, code in enumerate(PASSING, start=1):
            until(functools.partial(is_done, number * each))
            with PASSING[code](server, connection):
                threading.Event().wait(0.7)  # nothing tells when all have met with it

    async def main() -> list[GenerationResult]:
        async with Client(settings=settings) as client:
            asking = asyncio.create_task(client.generate("a call", max_tokens=900))
            prompts = [f"number{i}" for i in range(total)]
            await client.submit([{"prompt": p, "max_tokens": 20} for p in prompts], "run")
            reading = asyncio.create_task(read(client))
            await asyncio.to_thread(provoke)
            assert (await asking).ok
            return await reading

    async def read(client: Client) -> list[GenerationResult]:
        return [result async for result in client.run("run").results()]

    told = asyncio.run(asyncio.wait_for(main(), 200))
    assert sorted(result.index for result in told) == list(range(total))
    assert {(result.ok, result.attempt) for result in told} == {(True, 1)}
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 0, said
    rows = [json.loads(line) for line in (tmp_path / "rows.out.jsonl").read_text().splitlines()]
    assert sorted(row["row"] for row in rows) == list(range(total))
    assert {(row["text"][:3], row["attempt"]) for row in rows} == {("row", 1)}
    assert "CRITICAL" not in worker.said() and "Redis lost results" not in worker.said()
    assert completed(connection, "run", total)
    worker.process.terminate()
    assert worker.wait() == 0


def test_a_key_of_the_wrong_type_hurts_no_other_run(server, connection, start_worker, tmp_path):
    submit(connection, "bad", ["a b"] * 8)
    job = dataset_run(server.url, tmp_path, 4)
    until(lambda: connection.llen("rq:queue:batchmill") == 2)
    for name in ("bad", "rows"):
        connection.lpush(RunKeys.of(name).results, "somebody's")
    worker = start_worker(max_num_seqs=8)
    submit(connection, "good", ["a b"] * 8)
    settings = QueueSettings(redis_url=server.url, reconcile_s=0.5)

    async def main() -> tuple[object, list[GenerationResult], GenerationResult]:
        async with Client(settings=settings) as client:
            bad = asyncio.create_task(read(client, "bad"))
            good = await read(client, "good")
            with pytest.raises(RedisServerError, match="WRONGTYPE") as error:
                await bad
            return error.value, good, await client.generate("a b", max_tokens=2)

    async def read(client: Client, run: str) -> list[GenerationResult]:
        return [result async for result in client.run(run).results()]

    error, good, later = asyncio.run(asyncio.wait_for(main(), 60))
    assert not error.may_pass
    assert {result.ok for result in good} == {True} and len(good) == 8 and later.ok
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 2 and "WRONGTYPE" in said and "Traceback" not in said
    assert worker.process.poll() is None


def test_what_a_user_may_not_do_ends_everyone_with_a_line(server, connection, tmp_path):
    acl = ["ACL", "SETUSER", USER, "reset", "on", f">{PASSWORD}", "allkeys", "allchannels", "+@all"]
    connection.execute_command(*acl)
    url = server.url.replace("unix://", f"unix://{USER}:{PASSWORD}@")
    worker = WorkerProcess(url, tmp_path / "worker.log", "echo:tokens=500,step_s=0.02")
    until(lambda: workers(connection) or worker.process.poll() is not None)
    job = dataset_run(url, tmp_path, 64)
    settings = QueueSettings(redis_url=url, reconcile_s=0.2)

    async def main() -> None:
        async with Client(settings=settings) as client:
            asking = asyncio.create_task(client.generate("a b", max_tokens=500))
            await asyncio.to_thread(until, lambda: connection.zcard("rq:wip:batchmill"))
            await asyncio.to_thread(until, lambda: connection.exists(RunKeys.of("rows").hash))
            connection.execute_command("ACL", "SETUSER", USER, "-evalsha", "-xread", "-hgetall")
            with pytest.raises(RedisAuthError):
                await asking

    try:
        asyncio.run(asyncio.wait_for(main(), 60))
        assert worker.wait() == 1
        assert "worker can't go on" in worker.said()
        said = job.communicate(timeout=60)[1]
        assert job.returncode == 2 and "may not run a command" in said
        assert PASSWORD not in said + worker.said()
    finally:
        worker.kill()
        job.kill()
    assert connect(server.url).ping()
