"""Several turns of a row: each asked with the answers so far, whatever broke the run off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import redis
from kits.client_kit import Answerer
from kits.layout_kit import look, parse, request, turns, wrong

from batchmill import Layout, RowSelection
from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.run import run_dataset
from queue_api.datasets.summary import RunSummary
from queue_api.datasets.turns import TurnPass
from queue_api.wire.errors import DatasetError, InvalidRequestError
from queue_api.wire.schemas import GenerationRequest

NUM_ROWS = 60


def turns_of(row: int) -> list[str]:
    """One to four of them."""
    return [f"r{row}t{turn}" for turn in range(1 + row % 4)]


def answers_to(turns: list[str], system: str = "") -> list[str]:
    """What the answerer says, who tells all of the chat that it gets."""
    chat, answers = [system] if system else [], []
    for turn in turns:
        chat.append(turn)
        answers.append("answer to " + " / ".join(chat))
        chat.append(answers[-1])
    return answers


class Telling(Answerer):
    """Tells all of the chat that it gets."""

    def text_of(self, request: GenerationRequest) -> str:
        return "answer to " + " / ".join(str(turn.content) for turn in request.messages or ())


@pytest.fixture
def answerer(connection: redis.Redis) -> Answerer:
    return Telling(connection)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [{"id": f"q{row}", "turns": turns_of(row), "note": row} for row in range(NUM_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def answered(
    settings: QueueSettings, answerer: Answerer, *files: Path, **options: Any
) -> RunSummary:
    layout = Layout(turns_column="turns", **options.pop("layout", {}))
    async with Client(settings=settings) as client, answerer.answering():
        return await run_dataset(client, *files, layout=layout, chunk_size=8, window=32, **options)


def rows_of(path: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_number = {row["row"]: row for row in rows}
    assert len(by_number) == len(rows), "a row is there twice"
    return by_number


def check(rows: dict[int, dict[str, Any]], numbers: set[int], system: str = "") -> None:
    assert {*rows} == numbers
    for number, row in rows.items():
        answers = answers_to(turns_of(number), system)
        assert (row["text"], row["turn_texts"]) == (answers[-1], answers)
        assert (row["turns"], row["note"], row["id"]) == (turns_of(number), number, f"q{number}")


def test_each_turn_is_asked_with_the_answers_so_far(
    settings: QueueSettings, answerer: Answerer, source: Path
) -> None:
    output = source.with_name("out.jsonl")
    options = {"layout": {"system": "Be {{ note * 0 }}."}, "ordered": True}
    done = asyncio.run(answered(settings, answerer, source, output, **options))
    assert done.rows == NUM_ROWS
    check(rows_of(output), {*range(NUM_ROWS)}, "Be 0.")
    assert [*rows_of(output)] == [*range(NUM_ROWS)]
    assert not [*source.parent.glob(".out.jsonl.turn*")]
    again = asyncio.run(answered(settings, answerer, source, output, **options))
    assert (again.rows, again.resumed) == (0, NUM_ROWS)


@pytest.mark.parametrize("seed", range(6))
def test_a_run_broken_off_anywhere_ends_with_the_same_rows(
    settings: QueueSettings,
    connection: redis.Redis,
    answerer: Answerer,
    source: Path,
    seed: int,
) -> None:
    output, draw = source.with_name("out.jsonl"), random.Random(seed)
    selection = RowSelection(sample=40, shuffle=True) if seed % 2 else RowSelection()

    class Counting(Telling):
        left = 0

        def answer(self, jobs: int = 1, queue: str = "batchmill") -> int:
            if self.left <= 0:
                ended.set()
                return 0
            self.left -= 1
            return super().answer(1, queue)

    async def broken_off() -> None:
        counting = Counting(connection)
        counting.left = draw.randrange(16)
        work = asyncio.create_task(
            answered(settings, counting, source, output, selection=selection)
        )
        stop = asyncio.create_task(ended.wait())
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        for task in (work, stop):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    for _ in range(6):
        ended = asyncio.Event()
        asyncio.run(broken_off())
        if draw.random() < 0.4:
            connection.flushall()
        for path in [output, *source.parent.glob(".out.jsonl.turn*")]:
            if path.exists() and draw.random() < 0.4 and (size := path.stat().st_size):
                os.truncate(path, draw.randrange(size // 2, size))
    asyncio.run(answered(settings, answerer, source, output, selection=selection))
    check(rows_of(output), {*selection.numbers(NUM_ROWS)})


def test_changed_rows_are_asked_again_from_their_first_turn(
    settings: QueueSettings, answerer: Answerer, source: Path
) -> None:
    output = source.with_name("out.jsonl")
    asyncio.run(answered(settings, answerer, source, output))
    before = rows_of(output)
    lines = source.read_text().splitlines()
    lines[5] = json.dumps({"id": "q5", "turns": ["new", "r5t1"], "note": 5})
    lines[7] = json.dumps({"id": "q7", "turns": [*turns_of(7), "more"], "note": 7})
    source.write_text("\n".join(lines) + "\n")
    with pytest.raises(DatasetError, match="its row 5 has"):
        asyncio.run(answered(settings, answerer, source, output))
    done = asyncio.run(answered(settings, answerer, source, output, redo_changed=True))
    assert done.rows == 2
    after = rows_of(output)
    assert after[5]["turn_texts"] == answers_to(["new", "r5t1"])
    assert after[7]["turn_texts"] == answers_to([*turns_of(7), "more"])
    assert {n: row for n, row in after.items() if n not in (5, 7)} == {
        n: row for n, row in before.items() if n not in (5, 7)
    }


def test_a_wrong_row_is_one_row_and_an_earlier_turns_error_is_the_rows(
    settings: QueueSettings, answerer: Answerer, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"turns": ["a", "b"]},
        {"turns": []},
        {"turns": ["a", 3]},
        {"turns": ["a", "b"], "max_tokens": 0},
        {"turns": '["a", "b"]'},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asyncio.run(answered(settings, answerer, source, output))
    found = rows_of(output)
    assert found[0]["turn_texts"] == found[4]["turn_texts"] == answers_to(["a", "b"])
    assert "column 'turns' is [], not a list of turns" in found[1]["error"]
    assert "'turns[1]' is 3: a turn is a text" in found[2]["error"]
    assert "an earlier turn has no answer: line 4: 'max_tokens' is 0" in found[3]["error"]


def test_what_cannot_be_asked_in_turns_is_told_before_anything_starts(
    settings: QueueSettings, answerer: Answerer, source: Path
) -> None:
    with pytest.raises(DatasetError, match="beside which the answers to the first can stand"):
        asyncio.run(answered(settings, answerer, source, "-"))
    reading, writing = os.pipe()
    try:
        os.write(writing, source.read_bytes())
        output = source.with_name("out.jsonl")
        with pytest.raises(DatasetError, match="several turns are several passes"):
            asyncio.run(answered(settings, answerer, Path(f"/dev/fd/{reading}"), output))
    finally:
        os.close(writing)
        os.close(reading)


def test_a_row_with_more_turns_than_there_are_passes_is_wrong() -> None:
    with pytest.raises(InvalidRequestError, match="an earlier turn has no answer"):
        TurnPass(1, 1).so_far(0, 2)
    with pytest.raises(InvalidRequestError, match="an earlier turn has no answer"):
        TurnPass(1, 3).so_far(0, 2)


def test_the_first_look_reads_the_first_turn(source: Path) -> None:
    how_read, _ = look(source, turns_column="turns")
    assert how_read == "turns from column 'turns', each asked after the answer to the last"
    (row,) = parse({"turns": ["a", "b"]}, turns_column="turns", system="S")
    assert turns(row) == [("system", "S"), ("user", "a")]
    (other,) = parse({"turns": ["a", "c"]}, turns_column="turns", system="S", select=[])
    (same,) = parse({"turns": ["a", "b"]}, turns_column="turns", system="S", select=[])
    assert request(other).messages == request(same).messages
    assert other.fingerprint != same.fingerprint
    (row,) = parse({"turns": ["a"] * 65}, turns_column="turns")
    assert "has 65 turns; the limit is 64" in wrong(row)
