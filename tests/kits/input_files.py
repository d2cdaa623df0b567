"""Files of rows as people have them: how each is made, what is run, and what has to come of it.

The layouts are those of public files; the rows are made up. `docs/list_inputs.py` makes the table
in `docs/inputs.md` of them, and tests/test_dataset_inputs.py runs them.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from backports import zstd


@dataclass(frozen=True)
class InputFile:
    """A file, or several, and what comes of it."""

    name: str
    """What is given as INPUT, within the test's folder."""
    about: str
    write: Callable[[Path], None]
    """Make it in that folder."""
    asked: Sequence[str | None] = ()
    """For each row in, the prompt or the last turn that is asked; None: the row has an error."""
    told: str = ""
    """What an error says, of the file or of the first wrong row."""
    refused: bool = False
    """Whether the file as a whole is: exit code 2."""
    layout: dict[str, str] = field(default_factory=dict)
    """Where the prompt is: parameters of Layout."""
    format: str = ""

    @property
    def options(self) -> str:
        """As on the command line."""
        given = {**self.layout, **({"format": self.format} if self.format else {})}
        return " ".join(f"--{name.replace('_', '-')} '{value}'" for name, value in given.items())


Rows = Sequence[dict[str, Any]]


def lines(
    name: str, rows: Rows, end: str = "\n", encoding: str = "utf-8"
) -> Callable[[Path], None]:
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    return content(name, text.encode(encoding))


def content(name: str, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return write


def array(name: str, rows: Rows, indent: int | None = None) -> Callable[[Path], None]:
    return content(name, json.dumps(rows, indent=indent).encode())


def cells(
    name: str,
    rows: Sequence[Sequence[str]],
    separator: str = ",",
    end: str = "\n",
    encoding: str = "utf-8",
) -> Callable[[Path], None]:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator=end).writerows(rows)
    return content(name, text.getvalue().encode(encoding))


def parquet(*tables: tuple[str, Rows]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, rows in tables:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), folder / name)

    return write


def streams(name: str, shards: Sequence[Rows]) -> Callable[[Path], None]:
    """A folder as `datasets` writes it."""

    def write(folder: Path) -> None:
        (folder / name).mkdir(parents=True)
        files = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
        for file, rows in zip(files, shards, strict=True):
            table = pyarrow.Table.from_pylist(list(rows))
            with pyarrow.ipc.new_stream(folder / name / file, table.schema) as writer:
                writer.write_table(table)
        state = {"_data_files": [{"filename": file} for file in files], "_split": "train"}
        (folder / name / "state.json").write_text(json.dumps(state))
        (folder / name / "dataset_info.json").write_text("{}")

    return write


def both(*writes: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for each in writes:
            each(folder)

    return write


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(folder / "rows.zip", "w") as archive:
        archive.writestr("rows.jsonl", '{"prompt": "a"}\n')


def feather(folder: Path) -> None:
    table = pyarrow.table({"prompt": ["a", "b"], "kind": pyarrow.array(["x", "x"])})
    table = table.set_column(1, "kind", table["kind"].dictionary_encode())
    with pyarrow.ipc.new_file(folder / "rows.feather", table.schema) as writer:
        writer.write_table(table)


AB = [{"prompt": "a"}, {"prompt": "b é"}]
AB_LINES = "".join(json.dumps(row) + "\n" for row in AB).encode()
ASKED = ("a", "b é")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "I."},
    {"role": "user", "content": "Why?"},
]
SHARE = [
    {"from": "human", "value": "Who?"},
    {"from": "gpt", "value": "I."},
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "So."},
]
TASKS = [
    {"instruction": "Add.", "input": "2 and 3", "output": "5"},
    {"instruction": "Say hello.", "input": "", "output": "hello"},
]
BATCH_BODY = {
    "model": "gpt-4o-mini",
    "messages": CHAT,
    "max_completion_tokens": 20,
    "temperature": 0.5,
    "top_p": 0.9,
    "n": 1,
    "stop": ["\n\n"],
    "seed": 7,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {"50": -1},
    "logprobs": True,
    "top_logprobs": 2,
    "user": "u1",
    "metadata": {"k": "v"},
    "stream": False,
}


def batch_line(key: str, url: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"custom_id": key, "method": "POST", "url": url, "body": body}


QUOTED = [
    ["id", "prompt", "note"],
    ["1", 'He said "no", and left.', "a,b"],
    ["2", "two\nlines", ""],
]
FILES: tuple[InputFile, ...] = (
    InputFile("rows.jsonl", "JSON Lines", lines("rows.jsonl", AB), ASKED),
    InputFile("rows.jsonl", "CR LF", lines("rows.jsonl", AB, "\r\n"), ASKED),
    InputFile("bom.jsonl", "byte order mark", lines("bom.jsonl", AB, "\n", "utf-8-sig"), ASKED),
    InputFile("utf16.jsonl", "UTF-16", lines("utf16.jsonl", AB, "\r\n", "utf-16"), ASKED),
    InputFile(
        "damaged.jsonl",
        "a line that isn't JSON, a row without a prompt",
        content("damaged.jsonl", AB_LINES + b'{"prompt": "c\n{"promt": "d"}\n'),
        (*ASKED, None, None),
        "line 3: not JSON",
    ),
    InputFile(
        "rows.jsonl", "gzip by content", content("rows.jsonl", gzip.compress(AB_LINES)), ASKED
    ),
    InputFile(
        "rows.jsonl.gz",
        "gzip of two members",
        content("rows.jsonl.gz", gzip.compress(AB_LINES[:9]) + gzip.compress(AB_LINES[9:])),
        ASKED,
    ),
    InputFile("rows.jsonl.zst", "zstd", content("rows.jsonl.zst", zstd.compress(AB_LINES)), ASKED),
    InputFile("rows.jsonl.bz2", "bzip2", content("rows.jsonl.bz2", bz2.compress(AB_LINES)), ASKED),
    InputFile(
        "cut.jsonl.gz",
        "gzip that was cut off: its rows are written, then",
        content("cut.jsonl.gz", gzip.compress(AB_LINES)[:-4]),
        ASKED,
        "is gzip that was cut off",
        refused=True,
    ),
    InputFile("rows.zip", "a zip archive", zipped, (), "is a zip archive", refused=True),
    InputFile("empty.jsonl", "nothing", content("empty.jsonl", b""), ()),
    InputFile("rows.json", "a JSON array", array("rows.json", AB), ASKED),
    InputFile("array.jsonl", "a JSON array by content", array("array.jsonl", AB, 2), ASKED),
    InputFile("lines.json", "JSON Lines by content", lines("lines.json", AB), ASKED),
    InputFile(
        "printed.json",
        "objects over several lines (`jq .`)",
        content("printed.json", "\n".join(json.dumps(row, indent=2) for row in AB).encode()),
        ASKED,
    ),
    InputFile(
        "cut.json",
        "an array that was cut off: its whole rows are written, then",
        content("cut.json", json.dumps(AB).encode()[:-12]),
        ASKED[:1],
        "is a JSON array without its end",
        refused=True,
    ),
    InputFile(
        "data.json",
        "one object with the rows in a list",
        content("data.json", json.dumps({"version": 1, "data": AB}).encode()),
        (),
        "whose 'data' is a list of objects",
        refused=True,
    ),
    InputFile(
        "splits.json",
        "one object with several lists of rows",
        content("splits.json", json.dumps({"train": AB, "test": AB}).encode()),
        (),
        "several lists of objects, 'train', 'test'",
        refused=True,
    ),
    InputFile(
        "alpaca_data.json",
        "Alpaca: `instruction`, `input`, `output`",
        array("alpaca_data.json", TASKS, 1),
        ("Add. 2 and 3", "Say hello. "),
        layout={"template": "{{ instruction }} {{ input }}"},
    ),
    InputFile(
        "alpaca_data.json",
        "the same without an option",
        array("alpaca_data.json", TASKS, 1),
        (),
        "'input', 'instruction', 'output'",
        refused=True,
    ),
    InputFile(
        "seed_tasks.jsonl",
        "self-instruct: `instruction`, `instances`",
        lines(
            "seed_tasks.jsonl",
            [
                {
                    "id": "seed_0",
                    "instruction": "Add.",
                    "instances": [{"input": "", "output": "x"}],
                },
                {"id": "seed_1", "instruction": "Go.", "instances": []},
            ],
        ),
        ("Add.", "Go."),
        layout={"prompt_column": "instruction"},
    ),
    InputFile(
        "dolly.jsonl",
        "Dolly: `instruction`, `context`, `response`",
        lines(
            "dolly.jsonl",
            [
                {"instruction": "Who?", "context": "I did.", "response": "I", "category": "qa"},
                {"instruction": "Why?", "context": "", "response": "So", "category": "qa"},
            ],
        ),
        ("I did. Who?", "Why?"),
        layout={"template": "{% if context %}{{ context }} {% endif %}{{ instruction }}"},
    ),
    InputFile(
        "gsm8k.jsonl",
        "GSM8K: `question`, `answer`",
        lines("gsm8k.jsonl", [{"question": "2+3?", "answer": "#### 5"}]),
        ("2+3?",),
        layout={"prompt_column": "question"},
    ),
    InputFile(
        "question.jsonl",
        "MT-bench: `turns`, the first of them",
        lines(
            "question.jsonl",
            [{"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter."]}],
        ),
        ("Write.",),
        layout={"template": "{{ turns[0] }}"},
    ),
    InputFile(
        "samples.jsonl",
        "lm-evaluation-harness: `doc`, `arguments`",
        lines(
            "samples.jsonl",
            [{"doc_id": 0, "doc": {"q": "2+3?"}, "arguments": [["Q: 2+3?", {"until": []}]]}],
        ),
        ("Q: 2+3?",),
        layout={"template": "{{ arguments[0][0] }}"},
    ),
    InputFile(
        "HumanEval.jsonl.gz",
        "HumanEval: `task_id`, `prompt`, `test`",
        content(
            "HumanEval.jsonl.gz",
            gzip.compress(b'{"task_id": "HumanEval/0", "prompt": "def f():\\n", "test": "f()"}\n'),
        ),
        ("def f():\n",),
    ),
    InputFile(
        "sharegpt.json",
        "ShareGPT: `conversations` of `from` and `value`",
        array("sharegpt.json", [{"id": "c0", "conversations": SHARE}]),
        ("Why?",),
        layout={"messages_column": "conversations"},
    ),
    InputFile("chats.jsonl", "`messages`", lines("chats.jsonl", [{"messages": CHAT}]), ("Why?",)),
    InputFile(
        "batch.jsonl",
        "OpenAI's batch lines, every field",
        lines(
            "batch.jsonl",
            [
                batch_line("r-1", "/v1/chat/completions", BATCH_BODY),
                batch_line("r-2", "/v1/completions", {"model": "m", "prompt": "Hi", "best_of": 1}),
                batch_line("r-3", "/v1/embeddings", {"model": "m", "input": "Hi"}),
            ],
        ),
        ("Why?", "Hi", None),
        "/v1/embeddings",
    ),
    InputFile(
        "table.csv",
        "CSV with quotes and line breaks",
        cells("table.csv", QUOTED),
        (QUOTED[1][1], QUOTED[2][1]),
    ),
    InputFile(
        "table.csv",
        "CR LF and a byte order mark, as Excel writes it",
        cells("table.csv", QUOTED, ",", "\r\n", "utf-8-sig"),
        (QUOTED[1][1], QUOTED[2][1]),
    ),
    InputFile(
        "table.txt",
        "UTF-16 with tabs, as Excel writes it",
        cells("table.txt", QUOTED, "\t", "\r\n", "utf-16"),
        (QUOTED[1][1], QUOTED[2][1]),
    ),
    InputFile(
        "table.csv",
        "semicolons",
        cells("table.csv", QUOTED, ";", "\r\n"),
        (QUOTED[1][1], QUOTED[2][1]),
    ),
    InputFile(
        "rows.tsv", "tabs", cells("rows.tsv", [["prompt", "n"], ["a, b", "1"]], "\t"), ("a, b",)
    ),
    InputFile(
        "fields.csv",
        "sampling fields and empty cells",
        cells("fields.csv", [["prompt", "max_tokens"], ["a", "3"], ["b é", ""], ["", "4"]]),
        (*ASKED, None),
        "line 4: ",
    ),
    InputFile(
        "ragged.csv",
        "rows of other lengths",
        content("ragged.csv", "prompt,note\na,1\nx\ny,1,2\nb é,2\n".encode()),
        ("a", None, None, "b é"),
        "line 3: has 1 cells, where the header has 2",
    ),
    InputFile(
        "mmlu.csv",
        "MMLU: no names of columns",
        cells("mmlu.csv", [["2+3?", "4", "5", "6", "7", "B"], ["1+1?", "1", "2", "3", "4", "B"]]),
        (),
        "'2+3?'",
        refused=True,
    ),
    InputFile(
        "twice.csv",
        "a name that is there twice",
        cells("twice.csv", [["prompt", "prompt"], ["a", "b"]]),
        (),
        "has the column 'prompt' twice",
        refused=True,
    ),
    InputFile(
        "prompts.txt", "a prompt to a line", content("prompts.txt", b"a\n\nb, c\n"), ("a", "b, c")
    ),
    InputFile(
        "list", "the same by option", content("list", b"a\nb, c\n"), ("a", "b, c"), format="txt"
    ),
    InputFile(
        "list",
        "the same without",
        content("list", b"a\nb, c\n"),
        (),
        "looks like plain text: --format txt",
        refused=True,
    ),
    InputFile(
        "chats.parquet",
        "nested Parquet, with a time, a decimal and bytes",
        parquet(
            (
                "chats.parquet",
                [
                    {
                        "messages": CHAT,
                        "at": datetime(2024, 5, 6, tzinfo=UTC),
                        "price": Decimal("1.50"),
                        "image": {"bytes": b"\xff\xd8", "path": None},
                    }
                ],
            )
        ),
        ("Why?",),
    ),
    InputFile(
        "truthful_qa",
        "a folder of Parquet shards, as the Hub has them",
        parquet(
            ("truthful_qa/data/validation-00000-of-00002.parquet", [{"question": "Who?"}]),
            ("truthful_qa/data/validation-00001-of-00002.parquet", [{"question": "Why?"}]),
        ),
        ("Who?", "Why?"),
        layout={"prompt_column": "question"},
    ),
    InputFile(
        "splits",
        "such a folder with two splits",
        parquet(
            ("splits/data/train-00000-of-00001.parquet", AB),
            ("splits/data/test-00000-of-00001.parquet", AB),
        ),
        (),
        "has files of several splits: 'test', 'train'",
        refused=True,
    ),
    InputFile("saved", "`datasets`: save_to_disk", streams("saved", [AB[:1], AB[1:]]), ASKED),
    InputFile(
        "dict",
        "the same of a DatasetDict",
        both(
            streams("dict/train", [AB]),
            content("dict/dataset_dict.json", b'{"splits": ["train", "test"]}'),
        ),
        (),
        "has the splits 'train', 'test': name one",
        refused=True,
    ),
    InputFile("rows.feather", "Feather", feather, ("a", "b")),
    InputFile(
        "part-*",
        "a pattern over shards of two formats",
        both(lines("part-1.jsonl", AB[:1]), cells("part-2.csv", [["prompt"], ["b é"]])),
        ASKED,
    ),
)
