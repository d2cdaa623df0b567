"""Whose rows an output holds decides what of it stands when a run goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kits.client_kit import Answerer, rq_job
from kits.worker_kit import WorkerProcess
from rq.job import JobStatus

from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.columns import RowParser
from queue_api.datasets.formats.json_record import JsonRecordReader
from queue_api.datasets.formats.jsonl_sink import JsonLinesSink
from queue_api.datasets.formats.maker import Maker
from queue_api.datasets.formats.row_sink import MadeRow
from queue_api.datasets.run import run_dataset
from queue_api.datasets.summary import RunSummary
from queue_api.store.keys import RunKeys
from queue_api.store.runs import emit_args
from queue_api.store.scripts import load_script
from queue_api.wire.errors import DatasetError, InvalidRequestError
from queue_api.wire.schemas import FinishReason, GenerationResult, SamplingParams, StructuredOutputs

JSON_VALUES = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: int(row["row"]))


@pytest.fixture
def run(settings: QueueSettings, connection: redis.Redis) -> Callable[..., RunSummary]:
    def run(*args: Any, answerer: Answerer | None = None, **kwargs: Any) -> RunSummary:
        async def main() -> RunSummary:
            answers = (answerer or Answerer(connection)).answering()
            async with Client(settings=settings) as client, answers:
                return await run_dataset(client, *args, **kwargs)

        return asyncio.run(main())

    return run


FIRST = [{"prompt": "p0", "note": 0}, {"prompt": "p1", "note": 1, "max_tokens": 3}]


@pytest.mark.parametrize(
    ("rows", "options", "named"),
    [
        ([{"prompt": "other", "note": 0}, FIRST[1]], {}, "row 0 has 'p0' as 'prompt'"),
        ([FIRST[0], {**FIRST[1], "note": 2}], {}, "row 1 has 1 as 'note'"),
        ([FIRST[0], {**FIRST[1], "max_tokens": 4}], {}, "row 1 has 3 as 'max_tokens'"),
        ([FIRST[0], {**FIRST[1], "seed": 4}], {}, "row 1 was made without the column 'seed'"),
        ([FIRST[0], {"prompt": "p1"}], {}, "row 1 was made with a column 'note'"),
        ([FIRST[1], FIRST[0]], {}, "row 0 has 'p0' as 'prompt'"),
        ([FIRST[0]], {}, "has a row 1, counted from 0, and the input has 1 rows"),
        ([{"messages": [{"role": "user", "content": "p0"}]}, FIRST[1]], {}, "'messages'"),
        (FIRST, {"defaults": SamplingParams(max_tokens=5)}, "row 0 was made with other options"),
        (FIRST, {"defaults": SamplingParams(seed=5)}, "row 0 was made with other options"),
        (FIRST, {"fields": []}, "row 0 was made with other options"),
    ],
)
def test_rows_of_something_else_are_refused_or_made_anew(
    run: Callable[..., RunSummary],
    tmp_path: Path,
    rows: list[dict[str, Any]],
    options: dict[str, Any],
    named: str,
) -> None:
    source, output = write(tmp_path / "in.jsonl", FIRST), tmp_path / "out.jsonl"
    run(source, output)
    before = output.read_bytes()
    write(source, rows)
    with pytest.raises(DatasetError, match="the output belongs to another input") as told:
        run(source, output, **options)
    assert named in str(told.value)
    assert "--redo-changed" in str(told.value)
    assert output.read_bytes() == before
    summary = run(source, output, redo_changed=True, **options)
    assert summary.rows + summary.resumed == len(rows)
    found = rows_of(output)
    assert [row["row"] for row in found] == list(range(len(rows)))
    for row, given_row in zip(found, rows, strict=True):
        assert {name: row[name] for name in given_row} == given_row
        assert row["text"] == f"answer to {given_row.get('prompt')}"
    assert run(source, output, **options).resumed == len(rows)


def test_an_option_that_a_row_has_itself_changes_nothing_of_it(
    run: Callable[..., RunSummary], tmp_path: Path
) -> None:
    rows = [{"prompt": "p0", "max_new_tokens": 3}, {"prompt": "p1", "max_tokens": 3}]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    run(source, output, defaults=SamplingParams(max_tokens=9))
    assert run(source, output, defaults=SamplingParams(max_tokens=8)).resumed == 2


def test_an_edit_that_keeps_size_and_time_is_noticed(
    run: Callable[..., RunSummary], tmp_path: Path
) -> None:
    source, output = write(tmp_path / "in.jsonl", FIRST), tmp_path / "out.jsonl"
    run(source, output)
    info = source.stat()
    write(source, [{**FIRST[0], "prompt": "q0"}, FIRST[1]])
    os.utime(source, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert source.stat().st_size == info.st_size
    with pytest.raises(DatasetError, match="row 0 has 'p0' as 'prompt'"):
        run(source, output)
    output.unlink()
    run(source, output)
    assert rows_of(output)[0]["text"] == "answer to q0"


def test_a_row_that_does_not_say_what_made_it_is_not_taken_for_ours(
    run: Callable[..., RunSummary], tmp_path: Path
) -> None:
    source, output = write(tmp_path / "in.jsonl", FIRST), tmp_path / "out.jsonl"
    run(source, output)
    stripped = rows_of(output)
    for row in stripped:
        del row["fingerprint"]
    write(output, stripped)
    with pytest.raises(DatasetError, match="doesn't say what it was made of"):
        run(source, output)
    assert run(source, output, redo_changed=True).rows == 2


def test_a_pipe_is_checked_as_it_comes(run: Callable[..., RunSummary], tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", FIRST), tmp_path / "out.jsonl"
    run(source, output)

    def piped(*rows: dict[str, Any], **options: Any) -> RunSummary:
        reading, writing = os.pipe()
        os.write(writing, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        os.close(writing)
        try:
            return run(f"/dev/fd/{reading}", output, **options)
        finally:
            os.close(reading)

    assert piped(*FIRST).resumed == 2
    with pytest.raises(DatasetError, match="belongs to another input"):
        piped(FIRST[0], {"prompt": "other"})
    with pytest.raises(DatasetError, match="the input has 1 rows"):
        piped(FIRST[0])
    with pytest.raises(DatasetError, match="has to read the input twice"):
        piped(*FIRST, redo_changed=True)


def test_errors_stand_until_they_are_asked_for_again(
    run: Callable[..., RunSummary], connection: redis.Redis, tmp_path: Path
) -> None:
    class Failing(Answerer):
        def answer(self, jobs: int = 2**30, queue: str = "batchmill") -> int:
            job_ids = self.connection.lrange(f"rq:queue:{queue}", 0, -1)
            self.connection.delete(f"rq:queue:{queue}")
            for job_id in job_ids:
                run, number = job_id.decode().rsplit("-", 1)
                failed = GenerationResult(
                    id=number, run=run, index=int(number), finish_reason=FinishReason.ERROR
                )
                self._emit(RunKeys.of(run), emit_args([failed]))
                rq_job(self.connection, job_id.decode()).set_status(JobStatus.FINISHED)
            return len(job_ids)

    source, output = write(tmp_path / "in.jsonl", FIRST), tmp_path / "out.jsonl"
    summary = run(source, output, chunk_size=1, answerer=Failing(connection))
    assert (summary.errors, summary.all_failed) == (2, True)
    again = run(source, output, chunk_size=1)
    assert (again.rows, again.errors, again.errors_before) == (0, 0, 2)
    assert again.all_failed
    retried = run(source, output, chunk_size=1, retry_errors=True)
    assert (retried.rows, retried.errors, retried.errors_before) == (2, 0, 0)
    assert not retried.all_failed
    assert [row["text"] for row in rows_of(output)] == ["answer to p0", "answer to p1"]


def test_errors_that_were_put_right_are_made_again(
    run: Callable[..., RunSummary], tmp_path: Path
) -> None:
    wrong = [{"prompt": "p0", "max_tokens": 0}, {"question": "p1"}, {"prompt": ""}]
    source, output = write(tmp_path / "in.jsonl", [*FIRST, *wrong]), tmp_path / "out.jsonl"
    assert run(source, output).errors == 3
    write(source, [*FIRST, {"prompt": "p2"}, {"prompt": "p3"}])
    summary = run(source, output)
    assert (summary.rows, summary.resumed, summary.errors_before) == (2, 2, 0)
    texts = [row["text"] for row in rows_of(output)]
    assert texts == ["answer to p0", "answer to p1", "answer to p2", "answer to p3"]


def test_rows_of_another_model_are_refused_or_made_anew(
    run: Callable[..., RunSummary],
    connection: redis.Redis,
    start_worker: Callable[..., WorkerProcess],
    tmp_path: Path,
) -> None:
    source, output = write(tmp_path / "in.jsonl", FIRST), tmp_path / "out.jsonl"
    start_worker("echo:tokens=2")

    class Idle(Answerer):
        def answer(self, jobs: int = 2**30, queue: str = "batchmill") -> int:
            return 0

    idle = Idle(connection)
    run(source, output, answerer=idle)
    rows = rows_of(output)
    for row in rows:
        row["model"], row["model_revision"] = "another", "abc"
    write(output, rows)
    told = "made by another at revision abc, the workers have echo"
    with pytest.raises(DatasetError, match=told):
        run(source, output, answerer=idle)
    assert rows_of(output) == rows
    # what a wrong row says is no model's word
    write(output, [{**row, "model": "", "model_revision": ""} for row in rows])
    assert run(source, output, answerer=idle).resumed == 2
    write(output, rows)
    assert run(source, output, answerer=idle, redo_changed=True).rows == 2
    assert {row["model"] for row in rows_of(output)} == {"echo:tokens=2"}


def test_a_model_is_known_by_its_revision_wherever_its_folder_is() -> None:
    assert Maker("a", "r") == Maker("b", "r")
    assert {Maker("a", "r")} == {Maker("b", "r")}
    assert len({Maker("a", "r"), Maker("a", "s"), Maker("a"), Maker("b"), Maker()}) == 5


def test_results_of_another_model_that_wait_in_redis_are_made_anew(
    settings: QueueSettings,
    connection: redis.Redis,
    start_worker: Callable[..., WorkerProcess],
    tmp_path: Path,
) -> None:
    source, output = write(tmp_path / "in.jsonl", FIRST), tmp_path / "out.jsonl"

    async def dies_before_it_writes() -> None:
        async with Client(settings=settings) as client:
            work = asyncio.create_task(run_dataset(client, source, output, chunk_size=1))
            while connection.llen("rq:queue:batchmill") < 2 and not work.done():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            work.cancel()
            await asyncio.wait([work])

    asyncio.run(dies_before_it_writes())
    (name,) = {
        key.decode().split("-")[-2] for key in connection.lrange("rq:queue:batchmill", 0, -1)
    }
    run_id = f"in-{name}"
    stale = [
        GenerationResult(
            id=str(i), run=run_id, index=i, text="stale", model="another", finish_reason="stop"
        )
        for i in range(2)
    ]
    emit = connection.register_script(load_script("emit"))
    assert emit(RunKeys.of(run_id), emit_args(stale)) == 2
    connection.delete("rq:queue:batchmill", f"rq:job:{run_id}-0", f"rq:job:{run_id}-1")
    start_worker("echo:tokens=1")

    async def main() -> RunSummary:
        async with Client(settings=settings) as client:
            return await run_dataset(client, source, output, chunk_size=1)

    assert asyncio.run(main()).rows == 2
    assert [(row["text"], row["model"]) for row in rows_of(output)] == [
        ("p0", "echo"),
        ("p1", "echo"),
    ]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _drop_rows(path: Path) -> None:
    sink = JsonLinesSink(path)
    sink.drop(lambda row: row % 2 == 0)
    os._exit(0)


@pytest.mark.parametrize("seed", range(6))
def test_a_kill_while_rows_are_taken_out_leaves_all_or_the_rest(folder: Path, seed: int) -> None:
    path, wait = folder / "out.jsonl", random.Random(seed)
    write(path, [{"id": str(i), "row": i, "text": "x" * 2000} for i in range(4000)])
    path.chmod(0o640)
    child = multiprocessing.get_context("fork").Process(target=_drop_rows, args=(path,))
    child.start()
    with contextlib.suppress(multiprocessing.TimeoutError):
        child.join(wait.uniform(0, 0.1))
    if child.is_alive():
        os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    found = [row["row"] for row in rows_of(path)]
    assert found in (list(range(4000)), list(range(1, 4000, 2)))
    assert path.stat().st_mode & 0o777 == 0o640
    JsonLinesSink(path).close()
    assert [entry.name for entry in folder.iterdir()] == ["out.jsonl"]


def test_rows_are_taken_out_of_the_file_that_a_link_names(folder: Path) -> None:
    write(folder / "real.jsonl", [{"id": "0", "row": 0}, {"id": "1", "row": 1}])
    (folder / "out.jsonl").symlink_to("real.jsonl")
    sink = JsonLinesSink(folder / "out.jsonl")
    sink.drop(lambda row: row == 0)
    with pytest.raises(DatasetError, match="another process is writing"):
        JsonLinesSink(folder / "real.jsonl")
    sink.append([MadeRow(5, "f", {"id": "5", "row": 5})])
    sink.close()
    assert (folder / "out.jsonl").is_symlink()
    assert [row["row"] for row in rows_of(folder / "real.jsonl")] == [1, 5]


@hypothesis_settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), JSON_VALUES, max_size=4), st.randoms())
def test_a_fingerprint_is_of_the_columns_and_not_of_how_they_are_written(
    columns: dict[str, Any], draw: random.Random
) -> None:
    names = [*columns]
    draw.shuffle(names)
    shuffled = {name: columns[name] for name in names}
    parser = RowParser(SamplingParams(max_tokens=3), warn=lambda _: None)
    reader = JsonRecordReader()
    one = parser.fingerprint(reader.read(json.dumps(columns).encode()))
    again = reader.read(json.dumps(shuffled, indent=1, ensure_ascii=False).encode())
    assert parser.fingerprint(again) == one
    changed = {**columns, "prompt": "else"}
    if changed != columns:
        assert parser.fingerprint(reader.read(json.dumps(changed).encode())) != one


def test_defaults_that_cannot_travel_are_told_at_once(
    run: Callable[..., RunSummary], tmp_path: Path
) -> None:
    source, output = write(tmp_path / "in.jsonl", FIRST), tmp_path / "out.jsonl"
    form = StructuredOutputs(json={"const": "\ud83d"})
    with pytest.raises(InvalidRequestError, match="'sampling' can't be written as JSON: half"):
        run(source, output, defaults=SamplingParams(structured_outputs=form))
    assert not output.exists()
