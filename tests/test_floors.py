"""The house has three floors, and imports only go down."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import queue_api

ROOT = Path(__file__).parent.parent
FLOORS = ("workers", "engine", "queue_api")
HEAVY = {"torch", "transformers", "numpy", "safetensors"}


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def modules(floor: str) -> list[Path]:
    found = sorted((ROOT / floor).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", modules("queue_api"), ids=lambda p: p.name)
def test_queue_api_imports_nothing_from_above_and_no_torch(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in {"workers", "engine", *HEAVY}, name


@pytest.mark.parametrize("path", modules("engine"), ids=lambda p: p.name)
def test_the_engine_knows_the_wire_models_and_errors_alone(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in {"workers", "redis", "rq"}, name
        if name.split(".")[0] == "queue_api":
            assert name in {"queue_api.schemas", "queue_api.errors"}


def loaded_by(statement: str) -> set[str]:
    """The top-level modules in memory after the statement."""
    script = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(told.stdout.split())


def test_the_whole_of_queue_api_loads_no_torch() -> None:
    names = [path.stem for path in (ROOT / "queue_api").glob("*.py") if path.stem != "__init__"]
    everything = "\n".join(f"import queue_api.{name}" for name in names)
    assert loaded_by(everything) & HEAVY == set()


def test_the_wire_models_load_neither_redis_nor_rq() -> None:
    loaded = loaded_by("import queue_api.schemas, queue_api.errors")
    assert loaded & {"redis", "rq", "typer", *HEAVY} == set()


def test_what_queue_api_offers_is_there() -> None:
    for name in queue_api.__all__:
        assert getattr(queue_api, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        queue_api.nothing  # noqa: B018
