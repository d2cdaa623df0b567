"""Where in a row its prompt is: columns, chats, ids; and a word on what can't be read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from kits.layout_kit import look, parse, parser, request, turns, wrong

from batchmill import Layout
from queue_api.datasets.columns import output_row
from queue_api.datasets.formats.json_record import JsonRecordReader
from queue_api.wire.errors import ConfigurationError
from queue_api.wire.schemas import GenerationResult, SamplingParams


def test_a_named_column_is_the_prompt_and_the_row_comes_back_whole() -> None:
    columns = {"question": "What?", "prompt": "a label", "messages": 7, "max_tokens": 3, "x": None}
    (row,) = parse(columns, prompt_column="question")
    assert request(row).prompt == "What?"
    assert request(row).messages is None
    assert request(row).sampling.max_tokens == 3
    assert dict(row.columns) == columns


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "column 'q' is null"),
        ("", "column 'q' is empty"),
        (7, "column 'q' is 7: a prompt is a text"),
        ([{"role": "user", "content": "a"}], "if they are messages: --messages-column"),
        ([-1], "'prompt[0]' is -1"),
    ],
)
def test_a_row_whose_named_column_is_no_prompt_is_wrong_alone(value: Any, told: str) -> None:
    rows = parse({"q": value}, {"other": 1}, {"q": "fine"}, prompt_column="q")
    assert told in wrong(rows[0])
    assert wrong(rows[0]).startswith("line 1: ")
    assert "column 'q' isn't there" in wrong(rows[1])
    assert request(rows[2]).prompt == "fine"


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "What is 2 + 3?", "weight": 1},
]
TURNS = [("system", "Be brief."), ("user", "What is 2 + 3?")]


@pytest.mark.parametrize("chat", [CHAT, SHAREGPT])
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("with_answer", [False, True])
def test_chats_are_asked_up_to_the_last_turn_that_is_not_the_assistants(
    chat: list[dict[str, Any]], as_text: bool, with_answer: bool
) -> None:
    told: list[str] = []
    answer = {"role": "assistant", "content": "5"}
    if "from" in chat[0]:
        answer = {"from": "gpt", "value": "5"}
    value: Any = [*chat, answer] if with_answer else chat
    value = json.dumps(value) if as_text else value
    rows = parse({"talk": value}, {"talk": value}, messages_column="talk", warn=told.append)
    assert [turns(row) for row in rows] == [TURNS, TURNS]
    assert rows[0].columns["talk"] == value
    assert len([line for line in told if "asked without it" in line]) == with_answer


def test_the_assistants_last_turn_is_continued_if_the_row_says_so() -> None:
    talk = [*CHAT, {"role": "assistant", "content": "It is"}]
    (row,) = parse({"talk": talk, "continue_final_message": True}, messages_column="talk")
    assert turns(row) == [*TURNS, ("assistant", "It is")]


def test_every_speaker_of_sharegpt_has_its_role() -> None:
    talk = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"at": "here"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "GPT", "value": "It rains."},
        {"from": "user", "value": "And now?"},
    ]
    (row,) = parse({"conversations": talk}, messages_column="conversations")
    assert [role for role, _ in turns(row)] == ["user", "assistant", "tool", "assistant", "user"]
    call = (request(row).messages or [])[1].tool_calls
    assert call == [
        {"type": "function", "function": {"name": "weather", "arguments": {"at": "here"}}}
    ]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("Hi there", "not a list; if it is a prompt: --prompt-column"),
        ("[{'role': 'user', 'content': 'a'}]", "looks like Python's notation"),
        ([], "column 'talk' has no messages"),
        (3, "column 'talk' is 3, not a list of messages"),
        (["a"], "'talk[0]' is 'a': a message is an object"),
        ([{"from": "Narrator", "value": "a"}], "'talk[0]' is from 'Narrator'; known are assistant"),
        ([{"from": "human", "value": None}], "'talk[0]' has None as its 'value'"),
        ([{"from": "human"}], "'talk[0]' has None as its 'value'"),
        ([{"from": "gpt", "value": "a"}], "all messages are the assistant's"),
        ([{"role": "user"}], "'messages[0].content' is missing"),
        ([{"from": "function_call", "value": "sum(1)"}], "a function call is JSON"),
    ],
)
def test_a_chat_that_is_none_is_wrong_alone(value: Any, told: str) -> None:
    bad, fine = parse({"talk": value}, {"talk": CHAT}, messages_column="talk")
    assert told in wrong(bad)
    assert turns(fine) == TURNS


def out(row: Any) -> dict[str, Any]:
    result = GenerationResult(id=row.id, index=row.index, finish_reason="stop")
    return output_row(row.columns, result, row.fingerprint)


def test_ids_are_read_from_the_column_that_is_named() -> None:
    rows = parse(
        {"key": 7, "id": "other", "prompt": "a"},
        {"key": 7, "prompt": "a"},
        {"key": None, "prompt": "a"},
        {"key": [1], "prompt": "a"},
        id_column="key",
    )
    assert (rows[0].id, out(rows[0])["id"], out(rows[0])["key"]) == ("7", 7, 7)
    assert out(rows[0])["input_id"] == "other"
    assert "id '7' is that of line 1 too" in wrong(rows[1])
    assert rows[2].id == "2"
    assert "'key' is [1]: give a string or an integer" in wrong(rows[3])


def test_what_is_wrong_with_a_field_names_its_column() -> None:
    (row,) = parse({"q": [-1]}, prompt_column="q")
    assert wrong(row).startswith("line 1: 'prompt[0]' is -1: ")
    assert wrong(row).endswith("('prompt' is column 'q')")
    (row,) = parse({"talk": [{"role": "user"}]}, messages_column="talk")
    assert wrong(row).endswith("'messages[0].content' is missing ('messages' is column 'talk')")
    (row,) = parse({"prompt": "a", "key": ""}, id_column="key")
    assert wrong(row).endswith("'id' is empty ('id' is column 'key')")
    (row,) = parse({"prompt": "a", "id": ""}, id_column="id")
    assert wrong(row).endswith("'id' is empty")


def test_the_columns_that_became_the_prompt_do_not_travel_twice() -> None:
    read = parser(prompt_column="q", id_column="key", keep_columns=True)
    row = read.parse(JsonRecordReader().read(b'{"q": "a", "key": 1, "prompt": "b", "x": 2}'))
    assert request(row).metadata == {"key": 1, "prompt": "b", "x": 2, "id": 1}


def fingerprint(columns: dict[str, Any], **options: Any) -> str:
    (row,) = parse(columns, **options)
    record = JsonRecordReader().read(json.dumps(columns).encode(), 9)
    assert parser(**options).fingerprint(record) == row.fingerprint
    return row.fingerprint


def test_a_row_is_another_if_its_request_or_what_comes_back_is() -> None:
    columns = {"a": "text", "b": "text", "c": "other", "key": "1", "max_tokens": 2}
    first = fingerprint(columns, prompt_column="a")
    assert first == fingerprint(columns, prompt_column="b")  # the same prompt of the same row
    others = [
        fingerprint(columns, prompt_column="c"),
        fingerprint({**columns, "c": "changed"}, prompt_column="a"),
        fingerprint(columns, prompt_column="a", id_column="key"),
        fingerprint(columns, prompt_column="a", fields=frozenset({"id"})),
        fingerprint(columns, prompt_column="a", defaults=SamplingParams(seed=3)),
        fingerprint({**columns, "a": ""}, prompt_column="a"),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_rows_of_outputs_written_before_stay_as_they_are() -> None:
    # of a file that batchmill wrote before it knew of layouts
    assert fingerprint({"id": "a", "prompt": "p", "x": [1, 2.5]}) == "26bd4913246afea9"


COLUMNS = {"id": "i", "a": 1, "b": {"k": None}, "c": 1.10, "prompt": "p"}


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"select": ["c", "a"]}, {"id": "i", "c": 1.1, "a": 1}),
        ({"select": []}, {"id": "i"}),
        ({"drop": ["a", "prompt"]}, {"id": "i", "b": {"k": None}, "c": 1.1}),
        ({"select": ["a", "b"], "rename": {"a": "x"}}, {"id": "i", "x": 1, "b": {"k": None}}),
        (
            {"select": ["a", "b"], "rename": {"a": "b", "b": "a"}},
            {"id": "i", "b": 1, "a": COLUMNS["b"]},
        ),
        ({"drop": ["b"], "rename": {"a": "b"}}, {"id": "i", "b": 1, "c": 1.1, "prompt": "p"}),
        ({"select": ["a"], "id_column": "prompt"}, {"id": "p", "a": 1}),
        ({"select": ["input_id"], "id_column": "prompt"}, {"id": "p", "input_id": "i"}),
    ],
)
def test_the_columns_that_come_back_are_chosen(
    options: dict[str, Any], shown: dict[str, Any]
) -> None:
    (row,) = parse(COLUMNS, **options)
    assert request(row).prompt == "p"
    assert dict(row.columns) == shown
    assert [*row.columns] == [*shown]
    assert {name: out(row)[name] for name in shown} == shown
    assert out(row).keys() - shown.keys() == out(parse({"id": "i", "prompt": "p"})[0]).keys() - {
        "id",
        "prompt",
    }


def test_a_row_without_an_id_has_its_default_one_whatever_is_selected() -> None:
    rows = parse({"prompt": "p", "a": 1}, {"prompt": "p", "a": 1}, select=["a"])
    assert [out(row)["id"] for row in rows] == ["0", "1"]


def test_a_wrong_row_comes_back_with_the_chosen_columns_too() -> None:
    bad, worse = parse(
        {"a": 1, "b": 2}, '{"a": 1, "b": 2, "c": NaN}', rename={"a": "x"}, drop=["b"]
    )
    assert "either 'prompt'" in wrong(bad)
    assert dict(bad.columns) == dict(worse.columns) == {"x": 1}


def test_a_new_name_that_a_row_has_already_is_that_rows_error() -> None:
    rows = parse({"prompt": "p", "a": 1, "b": 2}, {"prompt": "p", "a": 1}, rename={"a": "b"})
    assert "column 'a' can't be renamed to 'b': the row has a column of that name" in wrong(rows[0])
    assert dict(rows[0].columns) == {"prompt": "p", "a": 1, "b": 2}
    assert dict(rows[1].columns) == {"prompt": "p", "b": 1}


def test_renamed_columns_travel_unless_the_request_has_them() -> None:
    read = parser(prompt_column="q", rename={"q": "question", "x": "seed"}, keep_columns=True)
    row = read.parse(JsonRecordReader().read(b'{"q": "a", "x": 2, "max_tokens": 3}'))
    assert request(row).metadata == {"seed": 2}
    assert request(row).sampling.seed is None


def test_dropping_what_a_request_needs_changes_no_request_and_another_row_is_another() -> None:
    columns = {"prompt": "p", "max_tokens": 3, "a": 1}
    (row,) = parse(columns, select=[])
    assert request(row).sampling.max_tokens == 3
    first = fingerprint(columns, select=[])
    assert first == fingerprint(columns, drop=[*columns])
    others = [
        fingerprint({**columns, "max_tokens": 4}, select=[]),
        fingerprint({**columns, "prompt": "q"}, select=[]),
        fingerprint(columns, select=["a"]),
        fingerprint(columns, select=["a"], rename={"a": "b"}),
    ]
    assert len({first, *others}) == 1 + len(others)
    assert first == fingerprint({**columns, "a": 2}, select=[])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"select": ["a", "a"]}, "column 'a' is selected twice"),
        ({"select": ["a", "b"], "drop": ["b"]}, "column 'b' is selected and dropped"),
        ({"drop": ["id"]}, "found by their 'id': it can't be dropped or renamed"),
        ({"rename": {"id": "key"}}, "it can't be dropped or renamed"),
        ({"rename": {"key": "id"}}, "no column can become it but by the id column"),
        ({"rename": {"a": ""}}, "a column without a name"),
        ({"rename": {"a": "c", "b": "c"}}, "two columns are renamed to 'c'"),
        ({"drop": ["a"], "rename": {"a": "b"}}, "'a' is renamed, but doesn't come back"),
        ({"select": ["b"], "rename": {"a": "b"}}, "'a' is renamed, but doesn't come back"),
        ({"rename": {"a": "text"}}, "'text' is a column of every output"),
    ],
)
def test_choices_of_columns_that_conflict_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(told)):
        parser(**options)


def test_options_that_exclude_each_other_or_name_nothing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="a prompt column or a messages column, not both"):
        Layout(prompt_column="a", messages_column="b")
    with pytest.raises(ConfigurationError, match="the id column is empty"):
        Layout(id_column="")


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt_column": "qestion"}, "(did you mean 'question'?); their columns are 'question'"),
        ({"messages_column": "talk"}, "no column 'talk', named for the messages"),
        ({"id_column": "uid"}, "no column 'uid', named for the id"),
        ({"prompt_column": "prompt", "select": ["x"]}, "no column 'x', named for the output"),
        ({"prompt_column": "prompt", "drop": ["x"]}, "no column 'x', named for the output"),
        ({"prompt_column": "prompt", "rename": {"x": "y"}}, "no column 'x', named for the output"),
    ],
)
def test_a_named_column_that_is_not_there_is_told_with_those_that_are(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    path = write(tmp_path / "in.jsonl", *[{"question": "a", "prompt": "b"}] * 2000)
    assert told in look(path, **options)[1]
    # and a pipe is told of at its first rows, whatever may come
    assert told in look_at_pipe(path, **options)


def look_at_pipe(path: Path, **options: Any) -> str:
    """What is said of a pipe that had one row of the file and stays open."""
    reading, writing = os.pipe()
    try:
        os.write(writing, path.read_bytes().partition(b"\n")[0] + b"\n")
        return look(Path(f"/dev/fd/{reading}"), **options)[1]
    finally:
        os.close(writing)
        os.close(reading)


def test_how_the_first_row_is_read_is_known(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", {"q": ""}, {"q": "a", "talk": CHAT, "prompt": "b"})
    assert look(path) == ("prompt from column 'prompt'", "")
    assert look(path, prompt_column="q") == ("prompt from column 'q'", "")
    assert look(path, messages_column="talk") == ("messages from column 'talk'", "")


@pytest.mark.parametrize(
    ("row", "option"),
    [
        ({"question": "a", "answer": "b"}, "--prompt-column question"),
        ({"instruction": "a", "output": "b"}, "--prompt-column instruction"),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            "--template $'{{ instruction }}\\n\\n{{ input or \"\" }}'",
        ),
        ({"conversations": SHAREGPT, "id": "a"}, "--messages-column conversations"),
        ({"chosen": CHAT, "x": 1}, "--messages-column chosen"),
        ({"conversation": json.dumps(CHAT)}, "--messages-column conversation"),
        ({"Question": "a"}, "--prompt-column Question"),
        ({"question_id": 81, "category": "x", "turns": ["a", "b"]}, "--turns-column turns"),
        ({"ctx_a": "a"}, "--prompt-column NAME, --messages-column NAME or --template"),
    ],
)
def test_a_file_in_a_known_layout_names_the_option_to_give(
    tmp_path: Path, row: dict[str, Any], option: str
) -> None:
    how_read, told = look(write(tmp_path / "in.jsonl", row, row))
    assert not how_read
    assert option in told
