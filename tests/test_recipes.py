"""Recipes: stages that feed each other, whatever breaks them off and whatever changes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import redis
from kits.client_kit import Answerer

from queue_api.client.client import Client
from queue_api.connection.child_process import child_environment, python_module
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.formats.opening import open_source
from queue_api.datasets.recipes.check_stages import check_stages
from queue_api.datasets.recipes.recipe import RecipeStage
from queue_api.datasets.recipes.recipe_file import read_recipe
from queue_api.datasets.recipes.recipe_output import RecipeSummary
from queue_api.datasets.recipes.recipe_run import RecipeRun, run_recipe
from queue_api.datasets.recipes.stage_answers import StageAnswers
from queue_api.datasets.run import Dataset
from queue_api.datasets.summary import RunSummary
from queue_api.datasets.verify import verify_output
from queue_api.wire.errors import ConfigurationError, DatasetError
from queue_api.wire.schemas import CompletionOutput, GenerationRequest

NUM_ROWS = 80
THREE = """
in: in.jsonl
out: out.jsonl
stages:
  - name: draft
    template: "draft {{ topic }}"
  - name: judge
    template: "judge {{ draft }}"
    keep: "not judge.endswith('3')"
  - name: final
    template: "final {{ draft }} / {{ judge }} / {{ topic }}"
"""


class Asked(Answerer):
    """Remembers what it was asked, and says a thing of its own to some prompts."""

    def __init__(self, connection: redis.Redis) -> None:
        super().__init__(connection)
        self.prompts: list[str] = []
        self.says: dict[str, str] = {}

    def text_of(self, request: GenerationRequest) -> str:
        prompt = request.prompt
        if request.messages is not None:
            prompt = " | ".join(str(message.content) for message in request.messages)
        self.prompts.append(str(prompt))
        known = (text for begin, text in self.says.items() if str(prompt).startswith(begin))
        return next(known, f"<{prompt}>")

    def asked(self) -> Counter[str]:
        """How often each kind of prompt came since the last time."""
        kinds = Counter(prompt.split()[0] for prompt in self.prompts)
        self.prompts.clear()
        return kinds


@pytest.fixture
def asked(connection: redis.Redis) -> Asked:
    return Asked(connection)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows([{"id": row, "topic": f"t{row}"} for row in range(NUM_ROWS)])
    return tmp_path


def write_rows(rows: list[dict[str, Any]]) -> None:
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(
    settings: QueueSettings, text: str, answerer: Asked | None, **options: Any
) -> RecipeSummary:
    Path("recipe.yaml").write_text(text)

    async def main() -> RecipeSummary:
        async with Client(settings=settings) as client:

            async def ask(stage: RecipeStage, name: str, dataset: Dataset) -> RunSummary:
                return await dataset.run(client, chunk_size=4, window=32)

            async with answerer.answering() if answerer else contextlib.nullcontext():
                return await run_recipe(RecipeRun(read_recipe("recipe.yaml"), ask, **options))

    return asyncio.run(main())


def written(name: str = "out.jsonl") -> dict[Any, dict[str, Any]]:
    rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows), "a row is there twice"
    return {row["id"]: row for row in rows}


def without_worker(rows: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    return {key: {**row, "worker": ""} for key, row in rows.items()}


def check_three(rows: dict[Any, dict[str, Any]], topics: dict[int, str]) -> None:
    kept = {row: topic for row, topic in topics.items() if not topic.endswith("3>>")}
    assert rows.keys() == kept.keys()
    for row, topic in kept.items():
        draft = f"<draft {topic}>"
        judge = f"<judge {draft}>"
        found = rows[row]
        assert (found["topic"], found["draft"], found["judge"]) == (topic, draft, judge)
        assert found["text"] == found["final"] == f"<final {draft} / {judge} / {topic}>"
        assert (found["row"], found["error"], found["finish_reason"]) == (row, "", "stop")
        assert found["usage"] == {"prompt_tokens": 6, "completion_tokens": 9}


def topics() -> dict[int, str]:
    return {row: f"t{row}" for row in range(NUM_ROWS)}


def test_each_stage_is_asked_with_the_answers_before(settings: QueueSettings, asked: Asked) -> None:
    summary = run(settings, THREE.replace("endswith('3')", "endswith('3>>')"), asked)
    left_out = sum(1 for topic in topics().values() if topic.endswith("3"))
    assert (summary.rows, summary.left_out, summary.errors) == (NUM_ROWS - left_out, left_out, 0)
    assert asked.asked() == {"draft": NUM_ROWS, "judge": NUM_ROWS, "final": NUM_ROWS - left_out}
    check_three(written(), {r: t for r, t in topics().items() if not t.endswith("3")})
    assert not verify_output("out.jsonl").problems


def test_what_has_not_changed_is_not_even_read(settings: QueueSettings, asked: Asked) -> None:
    run(settings, THREE, asked)
    before, asked.prompts = Path("out.jsonl").stat(), []
    summary = run(settings, THREE, None)
    assert summary.is_unchanged
    assert (summary.rows, summary.errors) == (NUM_ROWS, 0)
    assert Path("out.jsonl").stat().st_mtime_ns == before.st_mtime_ns


def test_only_what_depends_on_a_change_is_made_again(settings: QueueSettings, asked: Asked) -> None:
    run(settings, THREE, asked)
    asked.asked()
    other = THREE.replace("judge {{ draft }}", "judge this {{ draft }}")
    with pytest.raises(DatasetError, match="belongs to another input or other options"):
        run(settings, other, None)
    run(settings, other, asked, redo_changed=True)
    assert asked.asked() == {"judge": NUM_ROWS, "final": NUM_ROWS}
    rows = written()
    assert all(row["judge"].startswith("<judge this") for row in rows.values())
    assert all(row["judge"] in row["final"] for row in rows.values())
    changed = topics() | {7: "t7 new", 30: "t30 new"}
    write_rows([{"id": row, "topic": topic} for row, topic in changed.items()])
    run(settings, other, asked, redo_changed=True)
    assert asked.asked() == {"draft": 2, "judge": 2, "final": 2}
    assert {row for row, found in written().items() if "new" in found["final"]} == {7, 30}
    # a column that no stage reads: nothing is asked, and the output has it
    write_rows([{"id": row, "topic": topic, "note": 1} for row, topic in changed.items()])
    run(settings, other, asked, redo_changed=True)
    assert asked.asked() == {}
    assert {row["note"] for row in written().values()} == {1}
    # the last stage alone
    run(settings, other.replace("final {{", "finally {{"), asked, redo_changed=True)
    assert asked.asked() == {"finally": NUM_ROWS}


def test_rows_that_leave_the_input_leave_the_output(settings: QueueSettings, asked: Asked) -> None:
    run(settings, THREE, asked)
    asked.asked()
    write_rows([{"id": row, "topic": f"t{row}"} for row in range(10)])
    with pytest.raises(DatasetError, match="another input"):
        run(settings, THREE, None)
    run(settings, THREE, asked, redo_changed=True)
    assert asked.asked() == {}
    assert written().keys() == set(range(10))


@pytest.mark.parametrize("seed", range(6))
def test_a_recipe_broken_off_anywhere_goes_on(
    settings: QueueSettings, connection: redis.Redis, seed: int
) -> None:
    """At random instants the process ends, a file's last write is torn, all of Redis is lost."""
    draw = random.Random(seed)
    recipe = THREE.replace("  - name: judge", "    validate: {max_length: 10}\n  - name: judge")

    class Counting(Asked):
        left = 0

        def answer(self, jobs: int = 1, queue: str = "batchmill") -> int:
            if self.left <= 0:
                ended.set()
                return 0
            self.left -= 1
            return super().answer(1)

    async def broken_off() -> None:
        async with Client(settings=settings) as client, Counting(connection).answering():

            async def ask(stage: RecipeStage, name: str, dataset: Dataset) -> RunSummary:
                return await dataset.run(client, chunk_size=draw.choice([1, 8]), window=32)

            work = asyncio.create_task(run_recipe(RecipeRun(read_recipe("recipe.yaml"), ask)))
            await asyncio.wait(
                [work, asyncio.create_task(ended.wait())], return_when=asyncio.FIRST_COMPLETED
            )
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    Path("recipe.yaml").write_text(recipe)
    for _ in range(4):
        ended = asyncio.Event()
        Counting.left = draw.randrange(25)
        asyncio.run(broken_off())
        for file in Path("out.jsonl.stages").glob("*.jsonl"):
            content = file.read_bytes()
            if content and draw.random() < 0.5:
                keep = content.rfind(b"\n", 0, len(content) - 1) + 1
                os.truncate(file, draw.randint(keep, len(content)))
        if draw.random() < 0.3:
            connection.flushall()
        if draw.random() < 0.3:
            Path("out.jsonl.stages/done.json").unlink(missing_ok=True)
    asked = Asked(connection)
    run(settings, recipe, asked)
    found = without_worker(written())
    for name in ("out.jsonl", "out.jsonl.stages"):
        Path(name).rename(f"before-{name}")
    run(settings, recipe, asked)
    assert without_worker(written()) == found
    check_three(found, topics())


def test_a_row_that_fails_fails_alone_and_may_be_asked_again(
    settings: QueueSettings, asked: Asked
) -> None:
    rows: list[dict[str, Any]] = [{"id": row, "topic": f"t{row}"} for row in range(NUM_ROWS)]
    del rows[4]["topic"]
    write_rows(rows)
    summary = run(settings, THREE, asked)
    assert summary.errors == 1
    found = written()
    assert "'topic' is undefined" in found[4]["error"]
    assert found[4]["error"].startswith("stage 'draft': ")
    assert (found[4]["finish_reason"], found[4]["draft"], found[4]["text"]) == ("error", None, "")
    assert asked.asked() == dict.fromkeys(("draft", "judge", "final"), NUM_ROWS - 1)
    rows[4]["topic"] = "t4"
    write_rows(rows)
    summary = run(settings, THREE, asked)
    assert (summary.errors, asked.asked()) == (0, {"draft": 1, "judge": 1, "final": 1})
    check_three(written(), topics())


def test_an_invalid_text_is_asked_for_again_with_the_reason(
    settings: QueueSettings, asked: Asked
) -> None:
    recipe = """
in: in.jsonl
out: out.jsonl
stages:
  - name: number
    template: "number {{ topic }}"
    chat: true
    validate: {regex: '^\\d+$'}
    repair: 2
    repair_message: "wrong: {{ reason }}"
"""
    asked.says = {
        "number t1 | one | wrong: it doesn't match ^\\d+$": "uno",
        "number t1 | uno": "1",
        "number t2 | two": "2",
        "number t3 | three": "drei",
        "number t3 | drei": "drei",
        "number t1": "one",
        "number t2": "two",
        "number t3": "three",
        "number": "0",
    }
    write_rows([{"id": row, "topic": f"t{row}"} for row in range(5)])
    summary = run(settings, recipe, asked)
    assert asked.asked() == {"number": 5 + 3 + 2}
    columns = ("number", "number_valid", "number_attempts", "text")
    assert {key: tuple(row[name] for name in columns) for key, row in written().items()} == {
        0: ("0", True, 1, "0"),
        1: ("1", True, 3, "1"),
        2: ("2", True, 2, "2"),
        3: ("drei", False, 3, "drei"),
        4: ("0", True, 1, "0"),
    }
    assert written()[3]["number_invalid"] == "it doesn't match ^\\d+$"
    assert summary.invalid == {"number": 1}
    # what is valid now needs no repair, and the first text counts again
    loose = recipe.replace("'^\\d+$'", "'^[a-z0-9]+$'")
    run(settings, loose, asked, redo_changed=True)
    assert asked.asked() == {}
    assert [row["number"] for _, row in sorted(written().items())] == [
        *("0", "one", "two", "three", "0")
    ]


def test_the_best_of_several_samples(settings: QueueSettings, connection: redis.Redis) -> None:
    texts = ["bb", "a", "ccc", "a ", "dddd"]

    class Several(Asked):
        def samples_of(self, request: GenerationRequest) -> list[CompletionOutput] | None:
            if request.sampling.n == 1:
                return None
            return [
                CompletionOutput(index=i, text=text, finish_reason="stop")
                for i, text in enumerate(texts)
            ]

    recipe = """
in: in.jsonl
out: out.jsonl
stages:
  - name: draft
    template: "draft {{ topic }}"
    sampling: {n: 5, temperature: 1}
    best: HOW
    validate: {max_length: 3}
  - name: judge
    template: "judge{% for text in draft_texts %} {{ loop.index }}:{{ text }}{% endfor %}"
    picks: draft
"""
    write_rows([{"id": row, "topic": f"t{row}"} for row in range(3)])
    asked = Several(connection)
    asked.says = {"judge": "number 5 is best"}
    for how, best in {"first": "bb", "longest": "ccc", "shortest": "a", "vote": "a"}.items():
        for file in Path().glob("out.jsonl*"):
            file.rename(f"{how}-{file.name}")
        text = recipe.replace("HOW", how)
        run(settings, text.replace("    picks: draft\n", ""), asked)
        assert {row["draft"] for row in written().values()} == {best}
        assert {tuple(row["draft_texts"]) for row in written().values()} == {tuple(texts)}
    run(settings, text, asked)
    assert {(row["draft"], row["draft_picked"]) for row in written().values()} == {("dddd", 5)}


def test_rows_that_a_stage_is_not_for_go_on_without_it(
    settings: QueueSettings, asked: Asked
) -> None:
    recipe = THREE.replace(
        "final {{ draft }} / {{ judge }}", "final {{ draft or judge or 'none' }}"
    )
    recipe = recipe.replace(
        "  - name: judge", "    when: \"topic != 't1'\"\n  - name: judge\n    when: draft"
    )
    run(settings, recipe, asked)
    assert asked.asked() == {"draft": NUM_ROWS - 1, "judge": NUM_ROWS - 1, "final": NUM_ROWS}
    found = written()[1]
    assert (found["draft"], found["judge"]) == (None, None)
    assert found["final"] == "<final none / t1>"


def test_rows_may_be_chosen_and_columns_left_out(settings: QueueSettings, asked: Asked) -> None:
    recipe = THREE + "rows: {limit: 5}\nrename: {topic: subject}\n"
    summary = run(settings, recipe, asked)
    assert (summary.rows, asked.asked()["draft"]) == (5, 5)
    assert all("topic" not in row and row["subject"] for row in written().values())
    run(settings, recipe.replace("limit: 5", "limit: 7"), asked)
    assert asked.asked() == {"draft": 2, "judge": 2, "final": 2}
    assert len(written()) == 7


def test_the_output_may_be_parquet(settings: QueueSettings, asked: Asked) -> None:
    import pyarrow.parquet as pq

    recipe = THREE.replace("out.jsonl", "out.parquet")
    run(settings, recipe, asked)
    rows = {row["id"]: row for row in pq.read_table("out.parquet").to_pylist()}
    check_three(rows, topics())
    assert run(settings, recipe, None).is_unchanged


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"id": 1, "mine": true}\n', "isn't a row that batchmill wrote"),
        ('{"id": 1, "row": 0, "text": "a", "attempt": 1}\n', "a run without a recipe"),
    ],
)
def test_an_output_of_something_else_stays(
    settings: QueueSettings, asked: Asked, line: str, told: str
) -> None:
    Path("out.jsonl").write_text(line)
    with pytest.raises(DatasetError, match=told):
        run(settings, THREE, asked)
    assert Path("out.jsonl").read_text() == line
    assert not asked.prompts


def test_an_output_that_cannot_be_written_is_told_before_anything_is_asked(
    settings: QueueSettings, asked: Asked
) -> None:
    for output, told in {
        "none/out.jsonl": "No such file",
        "in.jsonl": "of in.jsonl isn.t a row",
    }.items():
        with pytest.raises(DatasetError, match=told):
            run(settings, THREE.replace("out.jsonl", output), asked)
    assert not asked.prompts
    assert len(Path("in.jsonl").read_text().splitlines()) == NUM_ROWS


# --------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("in: in.jsonl", "inn: in.jsonl"), "line 2: inn: there is no such key; write 'in'"),
        (("in: in.jsonl\n", ""), "line 2: 'in' is missing; write it as 'in: questions.jsonl'"),
        (("template: \"judge", "tempalte: \"judge"), "line 8: stages[2].tempalte: there is no such key; write 'template'"),  # noqa: E501
        (("name: judge", "name: Judge"), "line 7: stages[2].name: it is 'Judge'"),
        (("name: judge", "name: draft"), "two stages make a column 'draft'"),
        (("name: judge", "name: text"), "'text' is a column of every output"),
        (("name: judge", "name: yes"), "write it in quotes, 'true'"),
        (("keep:", "repair: 2\n    keep:"), "'repair' needs 'validate'"),
        (("keep:", "picks: draft\n    keep:"), "picks 'draft': name an earlier stage of which"),
        (("keep:", "validate: {regx: a}\n    keep:"), "line 9: stages[2].validate.regx: there is no such key; write 'regex'"),  # noqa: E501
        (("keep:", "sampling: {max_tokens: none}\n    keep:"), "line 9: stages[2].sampling.max_tokens"),  # noqa: E501
        (("keep:", "name: again\n    keep:"), "line 9: 'name' is there twice"),
        (("stages:", "stages: ["), "it isn't YAML"),
        (("out: out.jsonl", "out: '-'"), "'out' has to be a file or folder"),
        (("in: in.jsonl", "in: in.jsonl\nqueue: q\nmodel: demo"), "leave 'model', 'engine' and"),
        (("{{ topic }}\"\n  - name: judge", "{{ topic\"\n  - name: judge"), "stage 'draft'"),
        (("\"not judge", "\"not ("), "'keep' of stage 'judge'"),
        (("{{ draft }} /", "{{ drft }} /"), "stage 'final' fails on the first 80 rows"),
        (("{{ topic }}\"\n  - name: judge", "{{ topc }}\"\n  - name: judge"), "stage 'draft'"),
        (("keep:", "validate: {regex: '('}\n    keep:"), "the regex '(' can't be used"),
        (("keep:", "validate: {function: nope}\n    keep:"), "write it as package.module:name"),
        (("keep:", "validate: {json_schema: {type: 7}}\n    keep:"), "json_schema can't be used"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_recipe_is_said_with_its_line(
    settings: QueueSettings, change: tuple[str, str], told: str
) -> None:
    assert change[0] in THREE
    with pytest.raises(ConfigurationError) as error:
        run(settings, THREE.replace(*change, 1), None)
    assert told in str(error.value)
    assert not Path("out.jsonl").exists()


def test_a_column_of_a_stages_name_is_refused(settings: QueueSettings, asked: Asked) -> None:
    write_rows([{"id": 0, "topic": "a", "judge": 1}])
    with pytest.raises(DatasetError, match="line 1 has a column 'judge', which is a stage's"):
        run(settings, THREE, asked)
    assert not asked.prompts


# --------------------------------------------------------------------------- the examples

EXAMPLES = Path(__file__).parent.parent / "examples" / "recipes"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
def test_each_example_fits_its_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent.parent)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    recipe = read_recipe(EXAMPLES / f"{name}.yaml")
    for stage in recipe.stages:
        StageAnswers(stage).close()
    with contextlib.closing(open_source(recipe.inputs)) as source:
        check_stages(recipe, source, [(None, None)] * len(recipe.stages))


def batchmill(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = child_environment({"BATCHMILL_LOG_LEVEL": "warning", "PYTHONPATH": str(EXAMPLES)})
    return subprocess.run(
        python_module("batchmill", *arguments),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def test_the_command_runs_a_recipe_with_workers_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES.parent)
    (tmp_path / "out").mkdir()
    done = batchmill("run", "examples/recipes/sums.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = written("out/sums.jsonl")
    assert len(rows) == 24
    right = [row for row in rows.values() if row["sum"] == row["expected"]]
    assert len(right) >= 20  # of a toy
    assert all(row["kind"] == ("odd" if int(row["sum"]) % 2 else "even") for row in right)
    again = batchmill("run", "examples/recipes/sums.yaml", cwd=tmp_path)
    assert (again.returncode, "nothing has changed" in again.stderr) == (0, True)
    wrong = batchmill("run", "examples/recipes/sums.yaml", "--max-tokens", "3", cwd=tmp_path)
    assert (wrong.returncode, "--max-tokens belongs into the recipe" in wrong.stderr) == (2, True)


def test_another_model_s_texts_do_not_stand_unsaid(tmp_path: Path) -> None:
    write_rows([{"id": row, "topic": f"t{row}"} for row in range(3)])
    one = THREE[: THREE.index("  - name: judge")] + "sampling: {max_tokens: 4}\n"
    Path("recipe.yaml").write_text(one + 'model: "echo:tokens=2"\n')
    assert batchmill("run", "recipe.yaml", cwd=tmp_path).returncode == 0
    before = Path("out.jsonl").read_bytes()
    Path("recipe.yaml").write_text(one + 'model: "echo:tokens=3"\n')
    refused = batchmill("run", "recipe.yaml", cwd=tmp_path)
    assert (refused.returncode, "were made by echo:tokens=2" in refused.stderr) == (2, True)
    assert Path("out.jsonl").read_bytes() == before
    done = batchmill("run", "recipe.yaml", "--redo-changed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {row["model"] for row in written().values()} == {"echo:tokens=3"}


def test_a_column_that_cannot_be_renamed_counts_as_an_error(
    settings: QueueSettings, asked: Asked
) -> None:
    rows: list[dict[str, Any]] = [{"id": row, "topic": f"t{row}"} for row in range(4)]
    rows[2]["subject"] = "taken"
    write_rows(rows)
    summary = run(settings, THREE + "rename: {topic: subject}\n", asked)
    assert "can't be renamed to 'subject'" in written()[2]["error"]
    assert (summary.errors, "can't be renamed" in summary.first_error) == (1, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sums", "vote", "words", "stories"])
def test_the_examples_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES.parent)
    (tmp_path / "out").mkdir()
    done = batchmill("run", f"examples/recipes/{name}.yaml", "--fail-on-error", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
