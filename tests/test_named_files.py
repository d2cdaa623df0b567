"""Whatever documentation, a docstring or a comment names of the house is there."""

from __future__ import annotations

import ast
import importlib
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from kits.house import HOUSE, ROOT

from engine.engine import Engine

PLACES = "|".join([*HOUSE, "tests", "benchmarks", "docs", "examples"])
PATH = re.compile(rf"(?<![\w./-])(?:\.\./)?((?:{PLACES})/[\w./-]*\w)")
FILE = re.compile(r"(?<![\w./*<>{}-])(\w+\.(?:py|lua|c|h))\b(?!\.)")
DOTTED = re.compile(rf"(?<![\w./-])((?:{'|'.join(HOUSE)})(?:\.[A-Za-z_]\w*)+)(?![\w/])")
ENDINGS = (".md", ".lua", ".c", ".h", ".toml", ".yml", "Makefile", "Dockerfile", ".ci/run")
MADE = ("benchmarks/results/",)
"""Written by commands, not kept."""
FOREIGN = {"batchmill.generate", "examples/parallel", "tests/engine", "block_info.h"}
"""What isn't ours by that name: a job's function label, llama.cpp's example, what must not be, a
header of FlashAttention."""


@cache
def tracked() -> tuple[str, ...]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return tuple(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


def prose(name: str) -> str:
    """What people read of a file: of Python its docstrings and comments, of others all."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if not name.endswith(".py"):
        return text
    said = [
        node.value.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    said += [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join(said)


def is_there(dotted: str) -> bool:
    """Whether it is a module, or what a module has."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            if not hasattr(found, name):
                # `engine` is also what examples call their Engine
                return parts[0] == "engine" and hasattr(Engine, parts[1])
            found = getattr(found, name)
        return True
    return False


def missing(text: str) -> Iterator[str]:
    """What the text names and nobody has."""
    names = {Path(name).name for name in tracked()}
    for path in PATH.findall(text):
        if not (path.startswith(MADE) or path in FOREIGN or (ROOT / path).exists()):
            yield path
    for name in FILE.findall(text):
        if name not in names | FOREIGN:
            yield name
    for dotted in DOTTED.findall(text):
        if dotted not in FOREIGN and not dotted.endswith((".py", ".md")) and not is_there(dotted):
            yield dotted


def test_what_is_named_is_there() -> None:
    read = [name for name in tracked() if name.endswith((".py", *ENDINGS))]
    found = {name: sorted(set(missing(prose(name)))) for name in read}
    assert {name: gone for name, gone in found.items() if gone} == {}


@pytest.mark.parametrize(
    "text",
    [
        "see `engine/kv_cache.py`",
        "see (../engine/corpus.py)",
        "the scripts in `queue_api/scripts/`",
        "`attention_choice.py` says where",
        "`queue_api.schemas`",
        "queue_api.redis_server.EmbeddedRedis starts one",
        "python -m workers.cli",
    ],
)
def test_what_is_gone_is_seen(text: str) -> None:
    assert list(missing(text))


def test_what_is_there_may_be_named() -> None:
    text = (
        "engine/engine.py, ../docs/, keys.py, `queue_api.wire`, engine.add, queue_api.wire.schemas"
    )
    assert list(missing(text)) == []


# ---------------------------------------------------------------------------------------- links


def anchor(heading: str) -> str:
    """How a heading is linked to, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def dead_links(page: Path) -> Iterator[str]:
    """Links of a page to files, or to headings in them, that aren't there."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        if link.startswith(("https://", "http://")):
            continue
        if not target.exists():
            yield link
        elif heading and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            if heading not in map(anchor, headings):
                yield link


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    found = {str(page.relative_to(ROOT)): list(dead_links(page)) for page in pages}
    assert len(found) > 10
    assert {name: links for name, links in found.items() if links} == {}


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`, three\n[a](#one-two-three) [b](#gone) [c](page.md#gone) [d](no.md)"
    )
    assert list(dead_links(page)) == ["#gone", "page.md#gone", "no.md"]
