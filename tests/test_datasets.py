"""A dataset run, broken off anywhere, ends with each row once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import redis
from kits.client_kit import Answerer, rq_queue
from kits.worker_kit import WorkerProcess

from queue_api.client.client import Client
from queue_api.connection.embedded import EmbeddedRedis
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.run import dataset_run_id, run_dataset
from queue_api.datasets.summary import Progress, Quantiles, RunSummary
from queue_api.store.keys import RunKeys
from queue_api.store.run_store import read_entries
from queue_api.store.runs import emit_args
from queue_api.store.scripts import load_script
from queue_api.wire.errors import DatasetError, InvalidRequestError, RunNotFoundError
from queue_api.wire.schemas import FinishReason, GenerationResult, SamplingParams

NUM_ROWS = 300


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [{"id": i, "prompt": f"p{i}", "note": [i]} for i in range(NUM_ROWS)]
    rows[7] = {"id": 7, "prompt": "", "note": [7]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check_output(path: Path, num_rows: int = NUM_ROWS) -> None:
    """Every row once, with its own answer and columns."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == list(range(num_rows))
    for row in rows:
        assert row["row"] == row["id"] == row["note"][0]
        if row["id"] == 7:
            assert row["error"] == "line 8: 'prompt' is empty"
        else:
            assert row["text"] == f"answer to p{row['id']}"


def run(settings: QueueSettings, *args: Any, **kwargs: Any) -> RunSummary:
    async def main() -> RunSummary:
        async with Client(settings=settings) as client:
            with_answers = kwargs.pop("answerer", None)
            async with with_answers.answering() if with_answers else contextlib.nullcontext():
                return await run_dataset(client, *args, **kwargs)

    return asyncio.run(main())


def test_a_dataset_run_holds_no_more_than_its_window_in_redis(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer, source: Path
) -> None:
    output = source.with_name("out.jsonl")
    told: list[Progress] = []
    most = 0

    class Watching(Answerer):
        def answer(self, jobs: int = 1, queue: str = "batchmill") -> int:
            nonlocal most
            stream = RunKeys.of(dataset_run_id(source, output)).results
            jobs = rq_queue(connection).jobs
            waiting = sum(len(job.kwargs["requests"]) for job in jobs)
            assert all(job.result_ttl <= 5 for job in jobs), "finished jobs would pile up"
            most = max(most, waiting + len(read_entries(connection.xrange(stream))))
            return super().answer(1)

    summary = run(
        settings,
        source,
        output,
        chunk_size=4,
        window=16,
        on_progress=told.append,
        answerer=Watching(connection),
    )
    check_output(output)
    assert 0 < most <= 16
    assert (summary.rows, summary.resumed, summary.errors) == (NUM_ROWS, 0, 1)
    assert summary.completion_tokens == 3 * (NUM_ROWS - 1)
    assert (told[-1].done, told[-1].total, told[-1].errors) == (NUM_ROWS, NUM_ROWS, 1)
    assert connection.xlen(RunKeys.of(summary.run).results) == 0


@pytest.mark.parametrize("seed", range(8))
def test_a_run_broken_off_anywhere_goes_on(
    settings: QueueSettings, connection: redis.Redis, source: Path, seed: int
) -> None:
    """At random instants the process ends, its last write is torn, the output or all of Redis is
    lost; nobody is asked twice for what is safe in the output."""
    draw = random.Random(seed)
    output = source.with_name("out.jsonl")

    class Counting(Answerer):
        left = 0

        def answer(self, jobs: int = 1, queue: str = "batchmill") -> int:
            if self.left <= 0:
                ended.set()
                return 0
            self.left -= 1
            return super().answer(1)

    async def broken_off() -> None:
        async with Client(settings=settings) as client, Counting(connection).answering():
            work = asyncio.create_task(
                run_dataset(client, source, output, chunk_size=draw.choice([1, 8]), window=64)
            )
            await ended.wait()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    for _ in range(3):
        ended = asyncio.Event()
        Counting.left = draw.randrange(12)
        asyncio.run(broken_off())
        what = draw.choice(["torn", "torn", "lost output", "lost redis", "nothing"])
        if what == "torn" and (content := output.read_bytes()):
            keep = content.rfind(b"\n", 0, len(content) - 1) + 1
            os.truncate(output, draw.randint(keep, len(content)))
        elif what == "lost output":
            output.unlink()
        elif what == "lost redis":
            connection.flushall()
    summary = run(settings, source, output, answerer=Answerer(connection))
    check_output(output)
    assert summary.rows + summary.resumed == NUM_ROWS
    assert run(settings, source, output).resumed == NUM_ROWS, "there is nothing left to do"


@pytest.mark.parametrize("seed", range(6))
def test_a_run_that_redis_forgets_midway_is_asked_for_again(
    settings: QueueSettings, connection: redis.Redis, source: Path, seed: int
) -> None:
    """As a server that dies with its last seconds, or without a disk."""
    draw = random.Random(seed)
    output = source.with_name("out.jsonl")
    instants = {draw.randrange(1, 25) for _ in range(3)}
    told: list[str] = []

    class Forgetting(Answerer):
        answered = 0

        def answer(self, jobs: int = 1, queue: str = "batchmill") -> int:
            Forgetting.answered += 1
            if Forgetting.answered in instants:
                connection.flushall()
            return super().answer(1)

    summary = run(
        settings.model_copy(update={"reconcile_s": 0.2}),
        source,
        output,
        chunk_size=draw.choice([1, 8]),
        window=draw.choice([16, 64, 1000]),
        answerer=Forgetting(connection),
        warn=told.append,
        ordered=seed % 2 == 1,
    )
    check_output(output)
    assert (summary.rows, summary.resumed, summary.errors) == (NUM_ROWS, 0, 1)
    assert "Redis lost the run" in told[0]


def test_results_of_an_earlier_life_are_taken_not_made_again(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer, source: Path
) -> None:
    output = source.with_name("out.jsonl")

    async def dies_before_it_writes() -> None:
        async with Client(settings=settings) as client:
            work = asyncio.create_task(run_dataset(client, source, output))
            while not connection.llen("rq:queue:batchmill"):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            work.cancel()
            await asyncio.wait([work])

    asyncio.run(dies_before_it_writes())
    answered = answerer.answer()
    assert answered > 0
    later = Answerer(connection)
    asked = []
    plain = later.answer
    later.answer = lambda *a: asked.append(plain(*a)) or 0  # type: ignore[method-assign, func-returns-value]
    run(settings, source, output, answerer=later)
    check_output(output)
    assert sum(asked) + answered == NUM_ROWS - 1, "the wrong row is asked of nobody"


def test_results_of_half_a_chunk_that_an_earlier_life_left_stay_done(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer, source: Path
) -> None:
    """The chunk's other half is asked for; that mustn't take the first half for lost."""
    output = source.with_name("out.jsonl")
    name = dataset_run_id(source, output)

    async def dies_when_all_is_submitted() -> None:
        async with Client(settings=settings) as client:
            work = asyncio.create_task(run_dataset(client, source, output, chunk_size=8))
            while connection.llen("rq:queue:batchmill") < NUM_ROWS // 8 and not work.done():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            work.cancel()
            await asyncio.wait([work])

    asyncio.run(dies_when_all_is_submitted())
    half = [
        GenerationResult(
            id=str(i),
            run=name,
            index=i,
            text=f"answer to p{i}",
            finish_reason=FinishReason.STOP,
        )
        for i in range(16, 20)
    ]
    emit = connection.register_script(load_script("emit"))
    assert emit(RunKeys.of(name), emit_args(half)) == len(half)
    run(settings, source, output, answerer=answerer)
    check_output(output)
    assert connection.bitcount(RunKeys.of(name).done) == NUM_ROWS
    assert int(connection.hget(RunKeys.of(name).hash, "done")) == NUM_ROWS


def test_jobs_that_vanish_are_sent_again(
    settings: QueueSettings, connection: redis.Redis, source: Path
) -> None:
    class Losing(Answerer):
        lost: ClassVar[set[str]] = set()

        def answer(self, jobs: int = 1, queue: str = "batchmill") -> int:
            for job in rq_queue(connection).jobs:
                if job.id not in self.lost:
                    self.lost.add(job.id)
                    job.delete()
            # A job that comes after the look above is not to be answered before any was lost.
            return super().answer() if self.lost else 0

    output = source.with_name("out.jsonl")
    run(settings, source, output, chunk_size=100, answerer=Losing(connection))
    check_output(output)
    assert Losing.lost


def test_redis_killed_and_restarted_costs_nothing(source: Path, tmp_path: Path) -> None:
    with EmbeddedRedis() as own:
        settings = QueueSettings.load(redis_url=own.url, reconcile_s=0.2, reconnect_s=30)
        worker = WorkerProcess(own.url, tmp_path / "log", "echo:tokens=2", lease_s=2)
        output = source.with_name("out.jsonl")

        async def main() -> None:
            underway = asyncio.Event()

            def watch(progress: Progress) -> None:
                if progress.done > 50:
                    underway.set()

            async with Client(settings=settings) as client:
                work = asyncio.create_task(
                    run_dataset(client, source, output, chunk_size=4, window=32, on_progress=watch)
                )
                await underway.wait()
                await asyncio.to_thread(own.restart, kill=True)
                await work

        try:
            asyncio.run(main())
        finally:
            worker.kill()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == list(range(NUM_ROWS))
    assert [row["id"] for row in rows if row["error"]] == [7]


def test_real_workers_answer_a_dataset(
    settings: QueueSettings, source: Path, start_worker: Callable[..., WorkerProcess]
) -> None:
    start_worker("echo:tokens=2")
    output = source.with_name("out.jsonl")
    summary = run(settings, source, output, defaults=SamplingParams(max_tokens=1))
    rows = {row["id"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert {i: row["text"] for i, row in rows.items() if i != 7} == {
        i: f"p{i}" for i in range(NUM_ROWS) if i != 7
    }
    assert summary.completion_tokens == NUM_ROWS - 1
    assert rows[0]["usage"] == {"prompt_tokens": 1, "completion_tokens": 1}
    assert summary.total_s.count == NUM_ROWS - 1
    assert summary.queue_s.median is not None
    timings = rows[0]["timings"]
    parts = ("queue_s", "prefill_s", "decode_s", "publish_s")
    assert sum(timings[part] for part in parts) == pytest.approx(timings["total_s"], abs=1e-3)


def test_files_that_do_not_belong_together_are_told_apart(
    settings: QueueSettings, answerer: Answerer, source: Path
) -> None:
    output = source.with_name("out.jsonl")
    summary = run(settings, source, output, answerer=answerer)
    other = source.with_name("other.jsonl")
    other.write_text('{"id": "else", "prompt": "x"}\n')
    with pytest.raises(DatasetError, match="belongs to another input"):
        run(settings, other, output)
    with pytest.raises(InvalidRequestError, match="belongs to another input, output or other"):
        run(settings, other, source.with_name("third.jsonl"), run=summary.run)
    with pytest.raises(DatasetError, match="both input and output"):
        run(settings, source, source)
    with pytest.raises(DatasetError, match=r"can't read .*none.jsonl: No such file"):
        run(settings, source.with_name("none.jsonl"), output)
    check_output(output)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_in_words(
    settings: QueueSettings, answerer: Answerer, source: Path
) -> None:
    with pytest.raises(DatasetError, match="can't write /dev/full: No space left on device"):
        run(settings, source, "/dev/full", answerer=answerer)


def test_more_rows_may_be_appended_to_an_input(
    settings: QueueSettings, answerer: Answerer, source: Path
) -> None:
    output = source.with_name("out.jsonl")
    run(settings, source, output, answerer=answerer)
    with source.open("a") as file:
        file.write(json.dumps({"id": NUM_ROWS, "prompt": f"p{NUM_ROWS}", "note": [NUM_ROWS]}))
    summary = run(settings, source, output, answerer=answerer)
    assert (summary.rows, summary.resumed) == (1, NUM_ROWS)
    check_output(output, NUM_ROWS + 1)


def test_an_empty_input_is_a_complete_run(settings: QueueSettings, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n\n")
    summary = run(settings, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert summary.rows == 0

    async def main() -> None:
        async with Client(settings=settings) as client:
            assert (await client.status(summary.run)).complete
            with pytest.raises(RunNotFoundError):
                await client.status("another")

    asyncio.run(main())


def test_quantiles_are_exact_for_few_and_near_for_many() -> None:
    few = Quantiles()
    for value in range(100):
        few.add(value)
    assert (few.median, few.p99) == (50, 99)
    many = Quantiles(size=500)
    for value in range(20_000):
        many.add(value)
    assert many.median == pytest.approx(10_000, rel=0.2)
    assert Quantiles().median is None
