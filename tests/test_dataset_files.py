"""One input of many files: patterns, folders, addresses."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from kits.house import ROOT

from queue_api.datasets.chosen_source import ChosenSource
from queue_api.datasets.formats.opening import Inputs, open_source
from queue_api.datasets.row_selection import RowSelection
from queue_api.wire.errors import (
    BatchmillError,
    ConfigurationError,
    DatasetError,
)


def write(path: Path, *prompts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def write_shard(path: Path, *prompts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": list(prompts)}), path)


def write_stream(path: Path, *prompts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"prompt": list(prompts)})
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def prompts_of(inputs: Inputs, **options: Any) -> list[str]:
    with closing(open_source(inputs, **options)) as source:
        first = [record.read["prompt"] for record in source.records()]
        assert [record.read["prompt"] for record in source.records()] == first
        assert source.count() == len(first)
        assert source.identity() == source.identity()
        return first


def told_of(inputs: Inputs, **options: Any) -> str:
    with pytest.raises(BatchmillError) as told, closing(open_source(inputs, **options)) as source:
        list(source.records())
    return str(told.value)


def test_files_are_one_sequence_in_the_order_given(tmp_path: Path) -> None:
    b, a = write(tmp_path / "b.jsonl", "b1", "b2"), tmp_path / "a.csv"
    a.write_text("prompt\n\na1\na2\n")
    assert prompts_of([b, a]) == ["b1", "b2", "a1", "a2"]
    with closing(open_source([b, a])) as source:
        numbers = [record.number for record in source.records()]
        assert numbers == sorted(set(numbers))
        assert [source.place(number) for number in numbers] == [
            f"{b}, line 1",
            f"{b}, line 2",
            f"{a}, line 3",
            f"{a}, line 4",
        ]
        before = source.identity()
    write(b, "b1", "b3")
    with closing(open_source([b, a])) as source:
        assert source.identity() != before


def test_rows_of_several_files_can_be_chosen_among(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.jsonl", f"{i}a", f"{i}b") for i in range(3)]
    source = ChosenSource(open_source(files), RowSelection(limit=3, shuffle=True))
    with closing(source):
        found = [(record.row, record.read["prompt"]) for record in source.records()]
    assert found == [(row, f"{row // 2}{'ab'[row % 2]}") for row, _ in found]
    assert len(found) == 3


def test_a_pattern_is_its_files_sorted_without_the_output(tmp_path: Path) -> None:
    for name in ("c", "a", "sub/b"):
        write(tmp_path / f"{name}.jsonl", name)
    pattern = str(tmp_path / "*.jsonl")
    assert prompts_of(pattern) == ["a", "c"]
    assert prompts_of(str(tmp_path / "**" / "*.jsonl")) == ["a", "c", "sub/b"]
    assert prompts_of(pattern, output=tmp_path / "c.jsonl") == ["a"]
    assert told_of(str(tmp_path / "*.csv")).startswith("no file matches ")
    write(tmp_path / "c.jsonl.certificate.json", "no")
    assert prompts_of(str(tmp_path / "*.json*"), output=tmp_path / "c.jsonl") == ["a"]
    write(tmp_path / "sub" / "made" / "part-00000.jsonl", "no")
    assert prompts_of(tmp_path / "sub", output=tmp_path / "sub" / "made") == ["sub/b"]
    odd = write(tmp_path / "odd[1].jsonl", "odd")
    assert prompts_of(odd) == ["odd"]


def test_what_cannot_be_one_of_several_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "a")
    os.mkfifo(tmp_path / "fifo")
    assert "it can be read only once, give it alone" in told_of([path, "-"])
    assert "it can be read only once, give it alone" in told_of([path, tmp_path / "fifo"])
    assert "no such file" in told_of([path, tmp_path / "none"])
    assert "is given twice" in told_of([path, path])
    assert told_of([]) == "no input is given"


def test_a_damaged_file_among_others_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "b"}\n' * 9)
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:-4])
    write(tmp_path / "a.jsonl", "a")
    with closing(open_source(str(tmp_path / "*"))) as source:
        records = source.records()
        assert next(records).read == {"prompt": "a"}
        with pytest.raises(DatasetError, match=r"b\.jsonl\.gz is gzip that was cut off"):
            list(records)


def test_a_format_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt\na, b\n")
    with closing(open_source(path)) as source:
        assert "has 2 cells" in str(next(source.records()).error)
    assert prompts_of(path, format="txt") == ["prompt", "a, b"]
    assert prompts_of(path, format="tsv") == ["a, b"]
    assert "isn't whole Parquet" in told_of(path, format="parquet")
    with pytest.raises(ConfigurationError, match="there are jsonl, json, csv"):
        open_source(path, format="xml")


def test_a_folder_is_its_shards(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for number in (1, 0):
        write_shard(folder / f"train-0000{number}-of-00002.parquet", f"a{number}", f"b{number}")
    (folder / "README.md").write_text("# data")
    (folder / "dataset_infos.json").write_text("{}")
    write(folder / ".hidden.jsonl", "no")
    assert prompts_of(folder) == ["a0", "b0", "a1", "b1"]
    with closing(open_source(folder)) as source:
        assert source.schema() == pyarrow.schema([("prompt", pyarrow.string())])
    write_shard(folder / "test-00000-of-00001.parquet", "c")
    assert "has files of several splits: 'test', 'train'" in told_of(folder)
    assert prompts_of(str(folder / "**/*train*")) == ["a0", "b0", "a1", "b1"]
    (tmp_path / "empty").mkdir()
    assert "has no data files" in told_of(tmp_path / "empty")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a.jsonl", "b.csv"], "has files of several formats: '.csv', '.jsonl'"),
        (["main/a.jsonl", "other/a.jsonl"], "has files of several folders: 'main', 'other'"),
    ],
)
def test_a_folder_of_what_does_not_go_together_is_told(
    tmp_path: Path, names: list[str], told: str
) -> None:
    for name in names:
        write(tmp_path / name, "a")
    words = told_of(tmp_path)
    assert told in words
    assert prompts_of(words.rpartition(" '")[2].rstrip("'")) == ["a"]  # what it says to write


def test_a_folder_of_datasets_is_read_in_its_order(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for name in names:
        write_stream(folder / name, name)
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    assert prompts_of(folder) == names
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert prompts_of(tmp_path) == names
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert "has the splits 'train', 'test': name one" in told_of(tmp_path)
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    assert "flatten_indices()" in told_of(folder)
    (folder / "state.json").write_text("{")
    assert "isn't a whole folder of `datasets`" in told_of(folder)


def test_a_folder_of_the_hubs_cache_is_its_revision(tmp_path: Path) -> None:
    home = tmp_path / "datasets--user--name"
    for revision in ("abc", "def"):
        blob = home / "blobs" / revision
        write_shard(blob, revision)
        data = home / "snapshots" / revision / "data"
        data.mkdir(parents=True)
        (data / "train-00000-of-00001.parquet").symlink_to(blob)
    assert "has the revisions abc, def: name one" in told_of(home)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("def")
    assert prompts_of(home) == ["def"]


# ------------------------------------------------------------------------------------- addresses


def test_addresses_are_files_patterns_and_folders() -> None:
    memory = fsspec.filesystem("memory")
    for name, prompt in (("b", "é"), ("a", "a")):
        memory.pipe(f"/rows/{name}.jsonl", json.dumps({"prompt": prompt}).encode())
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p", "q"]}), table)
    memory.pipe("/tables/t.parquet", table.getvalue().to_pybytes())
    memory.pipe("/packed/t.jsonl.gz", gzip.compress(b'{"prompt": "z"}'))
    assert prompts_of("memory://rows/b.jsonl") == ["é"]
    assert prompts_of("memory://rows/*.jsonl") == ["a", "é"]
    assert prompts_of("memory://rows") == ["a", "é"]
    assert prompts_of(["memory://tables/t.parquet", "memory://packed/t.jsonl.gz"]) == [
        "p",
        "q",
        "z",
    ]
    with closing(open_source("memory://rows/a.jsonl")) as source:
        assert source.waits
        before = source.identity()
    memory.pipe("/rows/a.jsonl", b'{"prompt": "c"}')
    with closing(open_source("memory://rows/a.jsonl")) as source:
        assert source.identity() != before
    assert "there is no such file" in told_of("memory://rows/none.jsonl")
    assert "no file matches" in told_of("memory://rows/*.csv")


@pytest.mark.parametrize(
    ("name", "package"),
    [("rows.parquet", "pyarrow"), ("rows.zst", "backports"), ("memory://rows", "fsspec")],
)
def test_a_package_that_is_missing_is_named_with_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    write_shard(tmp_path / "rows.parquet", "a")
    (tmp_path / "rows.zst").write_bytes(zstd.compress(b"{}"))
    address = name if "://" in name else str(tmp_path / name)
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    told = told_of(address)
    assert "pip install 'batchmill[files]'" in told
    assert "isn't installed" in told


def test_nothing_heavy_is_loaded_before_it_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "a")
    script = (
        "import sys; from batchmill import Client, run_dataset\n"
        "from queue_api.datasets.formats.opening import open_source\n"
        f"assert list(open_source({str(path)!r}).records())\n"
        "print({'pyarrow', 'fsspec', 'datasets', 'pandas', 'backports'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_a_file_address_is_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a b.jsonl", "a")
    assert prompts_of(path.as_uri()) == ["a"]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        if self.path.startswith("/short"):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b'{"prompt": "a"}\n')
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        if self.path.startswith("/short"):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
        else:
            super().do_HEAD()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_rows_come_over_http_from_a_server_that_knows_no_ranges(site: str, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", *(f"p{i}" for i in range(20_000)))
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"prompt\na\n"))
    write_shard(tmp_path / "rows.parquet", "b", "c")
    assert len(prompts_of(f"{site}/rows.jsonl")) == 20_000
    assert prompts_of(f"{site}/rows.csv.gz?token=secret") == ["a"]
    assert prompts_of(f"{site}/rows.parquet") == ["b", "c"]
    assert "there is no such file" in told_of(f"{site}/none.jsonl")
    assert told_of(f"{site}/short.jsonl").startswith("can't read")


def test_no_password_is_shown() -> None:
    for address in ("http://me:secret@127.0.0.1:9/a?key=secret", "memory://me:secret@host/none"):
        told = told_of(address)
        assert "secret" not in told, told


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("adl://x/y", "pip install"),
        ("nonsense://x", "Protocol not known: nonsense"),
        ("http://127.0.0.1:9/a.jsonl", "can't read http://127.0.0.1:9/a.jsonl: "),
    ],
)
def test_what_cannot_be_reached_is_told_in_a_line(address: str, told: str) -> None:
    words = told_of(address)
    assert told in words
    assert "\n" not in words
