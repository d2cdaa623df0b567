"""`batchmill verify` finds whatever has happened to an output since it was certified."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kits.sink_kit import KINDS, LINES, PARTS, Kind, made

from queue_api.datasets.certificate import contradiction, write_certificate
from queue_api.datasets.formats.maker import Maker
from queue_api.datasets.verify import Verdict, verify_output
from queue_api.wire.errors import DatasetError

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
ROWS = 100


def certified(kind: Kind, folder: Path, rows: int = ROWS) -> Path:
    sink = kind.open(folder)
    for start in range(0, rows, 20):
        sink.append([made(row) for row in range(start, min(start + 20, rows))])
    sink.finish()
    write_certificate(sink, rows, {Maker("model", "rev")}, {})
    sink.close()
    return kind.path(folder)


@every_kind
def test_what_nothing_happened_to_is_as_certified(kind: Kind, tmp_path: Path) -> None:
    path = certified(kind, tmp_path)
    assert verify_output(path) == Verdict(rows=ROWS)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for entry in [entry for entry in tmp_path.iterdir() if entry != moved]:
        shutil.move(entry, moved / entry.name)
    assert verify_output(moved / path.name) == Verdict(rows=ROWS)
    said = json.loads(Path(f"{moved / path.name}.certificate.json").read_bytes())
    assert (said["rows_in"], said["rows_out"], said["missing"]) == (ROWS, ROWS, [])
    assert said["errors"] == {"invalid_request": 14}
    assert said["models"] == [{"model": "model", "revision": "rev"}]


@every_kind
def test_every_removed_row_is_named(kind: Kind, tmp_path: Path) -> None:
    path = certified(kind, tmp_path)
    certificate = Path(f"{path}.certificate.json").read_bytes()
    sink = kind.open(tmp_path)
    sink.drop(lambda row: row in (6, 40, 41, 42))
    sink.close()
    Path(f"{path}.certificate.json").write_bytes(certificate)
    problems = verify_output(path).problems
    assert [p for p in problems if "missing" in p] == [
        "row 6 is missing",
        "rows 40 to 42 are missing",
    ]
    assert not any("row" in p and "changed" in p and "file" not in p for p in problems)


@every_kind
def test_a_certificate_of_rows_of_the_same_numbers_is_not_enough(
    kind: Kind, tmp_path: Path
) -> None:
    """A text that was put in another's place, by whatever writes the format well."""
    path = certified(kind, tmp_path)
    certificate = Path(f"{path}.certificate.json").read_bytes()
    sink = kind.open(tmp_path)
    sink.drop(lambda row: row in (10, 11))
    sink.append([made(10, "text 11 é\n"), made(11, "text 10 é\n")])
    sink.finish()
    assert not sink.certificate.exists()
    Path(f"{path}.certificate.json").write_bytes(certificate)
    assert contradiction(sink)
    sink.close()
    problems = verify_output(path).problems
    assert "row 10 has changed" in problems
    assert "row 11 has changed" in problems


def repacked(kind: Kind, path: Path, change: Callable[[list[bytes]], list[bytes]]) -> list[str]:
    """What is found after a change to the file's lines."""
    packed = path.suffix == ".gz"
    content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    changed = b"".join(change(content.splitlines(keepends=True)))
    path.write_bytes(gzip.compress(changed) if packed else changed)
    return verify_output(path).problems


@pytest.mark.parametrize("kind", LINES[:2], ids=str)
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda lines: lines[:5] + lines[6:], ["row 5 is missing"]),
        (lambda lines: [*lines, lines[7]], ["row 7 is there again at line 101 of NAME"]),
        (
            lambda lines: [lines[0].replace(b'"usage"', b'"Usage"'), *lines[1:]],
            ["row 0 has changed"],
        ),
        (lambda lines: [b"notes\n", *lines], ["line 1 of NAME isn't a row that batchmill wrote"]),
        (lambda lines: lines[::-1], []),
        (lambda lines: lines[:40], ["rows 40 to 99 are missing"]),
    ],
)
def test_changes_to_lines(
    kind: Kind, tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], found: list[str]
) -> None:
    path = certified(kind, tmp_path)
    assert repacked(kind, path, change) == [line.replace("NAME", path.name) for line in found]


@every_kind
def test_a_byte_that_changed_anywhere_is_found(kind: Kind, tmp_path: Path) -> None:
    path = certified(kind, tmp_path)
    file = max(path.glob("part-*")) if path.is_dir() else path
    content = file.read_bytes()
    for place in range(len(content) // 50, len(content), len(content) // 11):
        damaged = bytearray(content)
        damaged[place] ^= 0x20
        file.write_bytes(damaged)
        verdict = verify_output(path)
        assert verdict.problems, place
        if path.is_dir():
            assert any(file.name in problem for problem in verdict.problems)
    file.write_bytes(content)
    assert verify_output(path).problems == []


@every_kind
def test_what_was_torn_is_found(kind: Kind, tmp_path: Path) -> None:
    path = certified(kind, tmp_path)
    file = max(path.glob("part-*")) if path.is_dir() else path
    file.write_bytes(file.read_bytes()[:-20])
    problems = verify_output(path).problems
    assert any("torn" in p or "can't be read" in p or "damaged" in p for p in problems)
    assert any("missing" in problem for problem in problems)


@pytest.mark.parametrize("kind", PARTS, ids=str)
def test_a_part_that_is_gone_or_there_twice_is_found(kind: Kind, tmp_path: Path) -> None:
    path = certified(kind, tmp_path)
    first, second = sorted(path.glob("part-*"))[:2]
    content = first.read_bytes()
    first.unlink()
    problems = verify_output(path).problems
    assert f"the file {first.name} is missing" in problems
    assert "rows 0 to 36 are missing" in problems
    first.write_bytes(content)
    twin = second.with_name(second.name.replace("00001", "00009"))
    shutil.copy(second, twin)
    problems = verify_output(path).problems
    assert f"row 37 is there again at {twin.name}" in problems
    assert f"the file {twin.name} isn't certified" in problems


def test_rows_with_gaps_between_them_are_all_there_is(tmp_path: Path) -> None:
    """As a sample of an input's rows has."""
    kind = LINES[0]
    sink = kind.open(tmp_path)
    sink.append([made(row) for row in (3, 4, 9, 20)])
    write_certificate(sink, 4, set(), {})
    sink.close()
    path = kind.path(tmp_path)
    said = json.loads(Path(f"{path}.certificate.json").read_bytes())
    assert (said["rows_in"], said["rows_out"], said["missing"]) == (4, 4, [])
    assert said["rows"] == [[3, 4], [9, 9], [20, 20]]
    assert verify_output(path) == Verdict(rows=4)
    with path.open("ab") as file:
        file.write(made(5).line + made(2000).line)
    assert [problem.partition(" at ")[0] for problem in verify_output(path).problems] == [
        "row 5",
        "row 2000",
    ]


def test_of_many_rows_a_block_is_named(tmp_path: Path) -> None:
    kind = LINES[0]
    path = certified(kind, tmp_path, rows=5000)

    def change(lines: list[bytes]) -> list[bytes]:
        lines[1001] = lines[1001].replace(b"text 1001", b"text 1007")
        return lines

    assert repacked(kind, path, change) == ["a row of rows 1000 to 1001 has changed"]


def test_without_a_certificate_there_is_nothing_to_compare(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("")
    with pytest.raises(DatasetError, match="no certificate"):
        verify_output(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl.certificate.json").write_text("[]")
    with pytest.raises(DatasetError, match="isn't a certificate"):
        verify_output(tmp_path / "out.jsonl")


def test_the_content_is_the_same_in_every_format(tmp_path: Path) -> None:
    contents = set()
    for number, kind in enumerate(KINDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = certified(kind, folder)
        contents.add(json.loads(Path(f"{path}.certificate.json").read_bytes())["content"])
    assert len(contents) == 1
