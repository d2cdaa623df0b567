"""`--cache`: what the same model was asked before isn't asked again."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from queue_api.datasets.formats.maker import Maker
from queue_api.datasets.response_cache import ResponseCache
from queue_api.wire.errors import DatasetError
from queue_api.wire.schemas import FinishReason, GenerationRequest, GenerationResult

ROOT = Path(__file__).parent.parent
NUM_ROWS = 300
MAKER = Maker("m", "revision")


def write(path: Path, prompts: list[str]) -> None:
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, output: str, *options: str) -> tuple[int, str]:
    """Rows taken from the cache, and all that was said."""
    model = ["--model", "echo:tokens=2"] if "--model" not in options else []
    done = subprocess.run(
        [sys.executable, "-m", "batchmill", "run", "in.jsonl", "-o", output, *model, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    taken = re.search(r"rows from the cache\W+([\d,]+)", done.stderr)
    told = done.stderr if done.returncode == 0 else f"exit {done.returncode}: {done.stderr}"
    return int(taken[1].replace(",", "")) if taken else 0, told


def texts(folder: Path, output: str) -> dict[int, str]:
    rows = [json.loads(line) for line in (folder / output).read_text().splitlines()]
    assert len({row["row"] for row in rows}) == len(rows)
    return {row["id"]: row["text"] for row in rows}


def test_only_what_changed_is_asked_for_and_another_model_is_asked_anew(tmp_path: Path) -> None:
    prompts = [f"p{i}" for i in range(NUM_ROWS)]
    write(tmp_path / "in.jsonl", prompts)
    assert run(tmp_path, "1", "--cache", "kept")[0] == 0
    assert run(tmp_path, "2", "--cache", "kept")[0] == NUM_ROWS
    assert texts(tmp_path, "1") == texts(tmp_path, "2") and len(texts(tmp_path, "1")) == NUM_ROWS
    prompts[7], prompts[250] = "other", "words"
    write(tmp_path / "in.jsonl", prompts)
    options = ("--cache", "kept", "--ordered", "--window", "8", "--chunk-size", "4")
    taken, told = run(tmp_path, "3", *options)
    assert taken == NUM_ROWS - 2, told
    found = texts(tmp_path, "3")
    assert list(found) == list(range(NUM_ROWS))
    assert (found[7], found[250], found[8]) == ("other other", "words words", "p8 p8")
    assert run(tmp_path, "4", "--cache", "kept", "--max-tokens", "1")[0] == 0
    assert texts(tmp_path, "4")[8] == "p8"
    assert run(tmp_path, "5", "--cache", "kept", "--model", "echo:tokens=3")[0] == 0
    assert texts(tmp_path, "5")[8] == "p8 p8 p8"


def test_a_cache_that_is_none_is_told(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "responses.sqlite").write_text("no database, but much text\n" * 1000)
    _, told = run(tmp_path, "out", "--cache", "kept")
    assert told.startswith("exit 2") and "the cache in kept can't be used" in told
    _, told = run(tmp_path, "out", "--cache", "in.jsonl")
    assert told.startswith("exit 2") and "the cache in in.jsonl can't be used" in told


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ResponseCache]:
    with closing(ResponseCache(tmp_path / "kept")) as cache:
        yield cache


def request(**fields: object) -> GenerationRequest:
    return GenerationRequest.parse({"id": "a", "prompt": "p", **fields})


def result(**fields: object) -> GenerationResult:
    made = {"model": "m", "model_revision": "revision", "finish_reason": FinishReason.STOP}
    return GenerationResult.model_validate({"id": "a", "text": "t", **made, **fields})


@pytest.mark.parametrize(
    ("asked", "made", "is_kept"),
    [
        ({}, {}, True),
        ({"sampling": {"temperature": 1.0, "seed": 3}}, {}, True),
        ({"sampling": {"temperature": 1.0}}, {}, False),
        ({}, {"applied_defaults": ["temperature"]}, False),  # the model's own
        ({"sampling": {"seed": 3}}, {"applied_defaults": ["temperature"]}, True),
        ({}, {"finish_reason": "cancelled"}, False),
        ({}, {"finish_reason": "error", "error": {"code": "c", "message": "m"}}, False),
        ({}, {"model": None}, False),
    ],
)
def test_what_would_be_made_again_is_kept(
    cache: ResponseCache, asked: dict[str, object], made: dict[str, object], is_kept: bool
) -> None:
    cache.keep([(request(**asked), result(**made))])
    assert (cache.find(request(**asked), MAKER) is not None) == is_kept


def test_a_text_is_found_by_whoever_asks_the_same_of_the_same(
    cache: ResponseCache, tmp_path: Path
) -> None:
    cache.keep([(request(metadata={"k": 1}), result(metadata={"k": 1}))])
    found = cache.find(request(id="b", metadata={"k": 2}, deadline=5e9), MAKER)
    assert found is not None and (found.id, found.metadata, found.text) == ("b", {"k": 2}, "t")
    moved = Maker("elsewhere", "revision")
    assert cache.find(request(), moved) is not None
    assert cache.find(request(), Maker("m", "other")) is None
    for other in ({"prompt": "q"}, {"sampling": {"max_tokens": 3}}, {"return_token_ids": True}):
        assert cache.find(request(**other), MAKER) is None
    with closing(ResponseCache(tmp_path / "kept", "other settings")) as second:
        assert second.find(request(), MAKER) is None
    with closing(sqlite3.connect(tmp_path / "kept" / "responses.sqlite")) as base, base:
        base.execute("UPDATE responses SET result = x'00'")
    assert cache.find(request(), MAKER) is None


def test_a_cache_that_was_closed_says_so(cache: ResponseCache) -> None:
    cache.close()
    with pytest.raises(DatasetError, match="can't be used"):
        cache.find(request(), MAKER)
