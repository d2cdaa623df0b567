"""Every kind of output holds each row once, whatever happens to who writes it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.sink_kit import KINDS, LINES, PAIRS, Kind, kill_while, made, write_until_killed

from queue_api.datasets.formats.maker import Maker
from queue_api.wire.errors import DatasetError

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
ROWS = st.lists(st.lists(st.integers(0, 9), max_size=4, unique=True), max_size=6)


@pytest.mark.parametrize("kind", LINES, ids=str)
@settings(deadline=None, max_examples=40)
@given(batches=ROWS, crashes=st.lists(st.integers(0, 1000), max_size=6), zeros=st.integers(0, 40))
def test_what_a_crash_tears_is_cut_off(
    kind: Kind, batches: list[list[int]], crashes: list[int], zeros: int
) -> None:
    """A crash may cut off anything of what was being written, or leave zeros in its place."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, batch in enumerate(batches):
            sink = kind.open(folder)
            before = kind.path(folder).stat().st_size
            sink.append([made(row) for row in batch if row not in sink])
            sink.close()
            if number < len(crashes):
                size = kind.path(folder).stat().st_size
                torn = max(before, size - crashes[number])
                os.truncate(kind.path(folder), torn)
                if before < torn < size:
                    os.truncate(kind.path(folder), torn + zeros)
        sink = kind.open(folder)
        wanted = {row for batch in batches for row in batch}
        sink.append([made(row) for row in wanted if row not in sink])
        sink.close()
        assert kind.rows(folder) == sorted(wanted)


@every_kind
@pytest.mark.parametrize("seed", range(4))
def test_after_a_kill_at_any_instant_each_row_is_there_once(
    kind: Kind, tmp_path: Path, seed: int
) -> None:
    reading, writing = os.pipe()
    wanted = range(300)
    for turn in range(6):
        arguments = (kind, tmp_path, wanted, seed * 100 + turn, writing)
        kill_while(write_until_killed, *arguments, within_s=0.25, seed=seed * 10 + turn)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    on_disk = {int.from_bytes(told[i : i + 4], "big") for i in range(0, len(told), 4)}
    sink = kind.open(tmp_path)
    assert {row for row in on_disk if row not in sink} == set()
    sink.append([made(row) for row in wanted if row not in sink])
    sink.finish()
    sink.close()
    assert kind.rows(tmp_path) == list(wanted)


@every_kind
def test_what_was_written_is_known_again(kind: Kind, tmp_path: Path) -> None:
    sink = kind.open(tmp_path)
    rows = [made(row) for row in (0, 2, 6, 1, 13)]
    sink.append(rows[:3])
    sink.append(rows[3:])
    digests, content = sink.digests, sink.content
    assert (sink.rows, sink.end) == (5, 14)
    assert sink.error_codes == {"invalid_request": 2}
    sink.close()
    again = kind.open(tmp_path)
    assert (again.rows, again.end, again.errors) == (5, 14, 2)
    assert [row in again for row in range(4)] == [True, True, True, False]
    assert not again.has_other(2, f"{2:016x}")
    assert again.has_other(2, "else")
    assert [again.has_error(row) for row in (0, 6, 13)] == [False, True, True]
    assert (again.maker(0), again.maker(1)) == (Maker("model-0", "rev"), Maker("model-1", "rev"))
    assert not again.maker(6)
    assert (again.digests, again.content) == (digests, content)
    assert again.error_codes == {"invalid_request": 2}
    found = again.find(2)
    assert found is not None
    assert found.columns["text"] == "text 2 é\n"
    assert found.has_input == (kind.options.format != "openai")
    assert again.find(3) is None
    again.close()


@every_kind
def test_rows_are_taken_out_and_made_again(kind: Kind, tmp_path: Path) -> None:
    sink = kind.open(tmp_path)
    sink.append([made(row) for row in range(40)])
    sink.drop(lambda row: row % 3 == 0)
    assert [row in sink for row in range(4)] == [False, True, True, False]
    sink.append([made(row, "new") for row in range(0, 40, 6)])
    sink.finish()
    sink.close()
    kept = [row for row in range(40) if row % 3 or row % 6 == 0]
    assert kind.rows(tmp_path) == kept
    again = kind.open(tmp_path)
    assert [row for row in range(40) if row in again] == kept
    again.drop(lambda row: True)
    again.close()
    assert kind.rows(tmp_path) == []


def drop_rows(kind: Kind, folder: Path) -> None:
    kind.open(folder).drop(lambda row: row % 2 == 0)
    os._exit(0)


@every_kind
@pytest.mark.parametrize("seed", range(3))
def test_a_kill_while_rows_are_taken_out_leaves_all_or_the_rest(
    kind: Kind, tmp_path: Path, seed: int
) -> None:
    sink = kind.open(tmp_path)
    sink.append([made(row) for row in range(500)])
    sink.close()
    kill_while(drop_rows, kind, tmp_path, within_s=0.1, seed=seed)
    again = kind.open(tmp_path)
    found = [row for row in range(500) if row in again]
    again.close()
    allowed = [list(range(500)), list(range(1, 500, 2))]
    if kind in PAIRS:  # first in one file, then in the other
        allowed.append([row for row in range(500) if row % 2 or row % 7 == 6])
    assert found in allowed
    assert kind.rows(tmp_path) == found


@every_kind
def test_two_writers_exclude_each_other(kind: Kind, tmp_path: Path) -> None:
    first = kind.open(tmp_path)
    with pytest.raises(DatasetError, match="another process is writing"):
        kind.open(tmp_path)
    first.append([made(0)])
    first.drop(lambda row: False)
    with pytest.raises(DatasetError, match="another process is writing"):
        kind.open(tmp_path)
    first.close()
    kind.open(tmp_path).close()
    assert kind.rows(tmp_path) == [0]


@every_kind
def test_an_output_without_rows_is_kept_or_removed(kind: Kind, tmp_path: Path) -> None:
    kind.open(tmp_path).close(keep_empty=False)
    assert list(tmp_path.iterdir()) == []
    sink = kind.open(tmp_path)
    sink.finish()
    sink.close()
    assert kind.rows(tmp_path) == []
    kind.open(tmp_path).close(keep_empty=False)
    assert kind.path(tmp_path).exists()  # it was there before


@every_kind
@pytest.mark.parametrize("content", [b"my notes\n", b'{"mine": 1}\n', b"\0\1\2"])
def test_what_is_of_others_is_never_touched(kind: Kind, tmp_path: Path, content: bytes) -> None:
    kind.path(tmp_path).write_bytes(content)
    with pytest.raises(DatasetError, match="choose another output"):
        kind.open(tmp_path)
    assert kind.path(tmp_path).read_bytes() == content


@every_kind
def test_a_place_that_cannot_be_written_is_told(kind: Kind, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="can't write"):
        kind.open(tmp_path / "none")


def write_until_full(kind: Kind, folder: Path, limit: int, ack: int) -> None:
    sink = kind.open(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        for start in range(0, 10_000, 5):
            sink.append([made(row) for row in range(start, start + 5)])
            os.write(ack, start.to_bytes(4, "big"))
    except DatasetError as error:
        assert "can't write" in str(error)
    with contextlib.suppress(DatasetError):
        sink.close()
    os._exit(0)


@every_kind
@pytest.mark.parametrize("limit", [3000, 12_000])
def test_where_there_is_no_room_what_was_written_stays(
    kind: Kind, tmp_path: Path, limit: int
) -> None:
    reading, writing = os.pipe()
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=write_until_full, args=(kind, tmp_path, limit, writing))
    child.start()
    child.join()
    assert child.exitcode == 0
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        batches = len(pipe.read()) // 4
    assert batches < 2000
    sink = kind.open(tmp_path)
    assert [row for row in range(batches * 5) if row not in sink] == []
    sink.append([made(row) for row in range(2000) if row not in sink])
    sink.finish()
    sink.close()
    assert kind.rows(tmp_path) == list(range(2000))


@every_kind
def test_a_change_takes_the_certificate_away(kind: Kind, tmp_path: Path) -> None:
    sink = kind.open(tmp_path)
    sink.certificate.write_text("{}")
    assert not sink.has_changed
    sink.append([made(0)])
    assert not sink.certificate.exists()
    sink.close()


def test_a_foreign_gzip_that_is_torn_is_not_cut(tmp_path: Path) -> None:
    kind = LINES[1]
    sink = kind.open(tmp_path)
    sink.append([made(0)])
    sink.close()
    whole = kind.path(tmp_path).read_bytes()
    foreign = whole[whole.index(b"\x1f\x8b", 3) :][:-3]  # without what ours begin with
    kind.path(tmp_path).write_bytes(foreign)
    with pytest.raises(DatasetError, match="isn't a row that batchmill wrote"):
        kind.open(tmp_path)
    assert kind.path(tmp_path).read_bytes() == foreign


@pytest.mark.parametrize("kind", LINES[1:], ids=str)
def test_damage_within_is_no_torn_end(kind: Kind, tmp_path: Path) -> None:
    sink = kind.open(tmp_path)
    for row in range(3):
        sink.append([made(row)])
    sink.close()
    content = bytearray(kind.path(tmp_path).read_bytes())
    content[len(content) // 2] ^= 0xFF
    kind.path(tmp_path).write_bytes(content)
    with pytest.raises(DatasetError, match="is damaged behind byte"):
        kind.open(tmp_path)
    assert kind.path(tmp_path).read_bytes() == content


@pytest.mark.parametrize("kind", LINES[1:], ids=str)
def test_a_file_that_was_packed_anew_is_continued(kind: Kind, tmp_path: Path) -> None:
    sink = kind.open(tmp_path)
    sink.append([made(0), made(1)])
    sink.close()
    path = kind.path(tmp_path)
    tool = ["gzip", "zstd"][path.suffix == ".zst"]
    os.system(f"{tool} -dc {path} > {path}.plain && {tool} -c < {path}.plain > {path}")
    sink = kind.open(tmp_path)
    sink.append([made(2)])
    sink.close()
    assert kind.rows(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("kind", LINES[1:], ids=str)
def test_packed_lines_are_read_by_what_people_use(kind: Kind, tmp_path: Path) -> None:
    pyarrow_json = pytest.importorskip("pyarrow.json")
    sink = kind.open(tmp_path)
    for row in range(20):
        sink.append([made(row)])
    sink.close()
    assert pyarrow_json.read_json(kind.path(tmp_path)).num_rows == 20
    if shutil.which("gzip") and kind.name.endswith("gz"):
        assert os.system(f"gzip -t {kind.path(tmp_path)}") == 0
