"""The house has four floors with wings on each, and imports only go down, between wings too."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from kits.house import HOUSE, ROOT, WINGS, faults, graph, imports, modules, wing_of

import batchmill
from queue_api.wire import errors

HEAVY = {"torch", "transformers", "numpy", "safetensors"}
FOUND = graph()


def test_imports_run_down_and_there_is_no_circle() -> None:
    assert faults(FOUND) == []


def a_module_of(wing: str) -> str:
    return next(module for module in FOUND if wing_of(module) == wing)


@pytest.mark.parametrize(("upper", "lower"), list(combinations(WINGS, 2)))
def test_an_import_that_runs_up_is_a_fault(upper: str, lower: str) -> None:
    """Planted between any two wings, also where one floor may use the other the other way round."""
    importer, imported = a_module_of(lower), a_module_of(upper)
    planted = FOUND | {importer: FOUND[importer] | {imported}}
    assert any(f"{importer} " in fault and imported in fault for fault in faults(planted))


def test_a_planted_file_is_seen(tmp_path: Path) -> None:
    for floor in HOUSE:
        (tmp_path / floor).mkdir()
        (tmp_path / floor / "__init__.py").write_text("")
    for wing in ("attention", "stages"):
        (tmp_path / "engine" / wing).mkdir()
        (tmp_path / "engine" / wing / "__init__.py").write_text("")
    (tmp_path / "engine/stages/stage.py").write_text("from engine.attention import hook\n")
    (tmp_path / "engine/attention/hook.py").write_text("X = 1\n")
    assert faults(graph(tmp_path)) == []
    late = "def f() -> None:\n    from engine.stages.stage import hook\n"
    (tmp_path / "engine/attention/hook.py").write_text(late)
    said = faults(graph(tmp_path))
    assert "engine.attention.hook imports up: engine.stages.stage" in said
    assert any(fault.startswith("a circle: ") for fault in said)


def test_a_circle_within_a_wing_is_a_fault() -> None:
    pair = ("engine.attention.sdpa", "engine.attention.masks")
    planted = FOUND | {a: FOUND[a] | {b} for a, b in (pair, pair[::-1])}
    assert any("a circle" in fault for fault in faults(planted))


def test_a_module_without_a_place_is_a_fault() -> None:
    assert faults(FOUND | {"engine.utils": frozenset()}) == [
        "engine.utils has no place in the house"
    ]


@pytest.mark.parametrize("name", sorted(n for n in FOUND if n.startswith("queue_api")))
def test_queue_api_imports_no_torch(name: str) -> None:
    assert not {part.partition(".")[0] for part in imports(modules()[name])} & HEAVY


@pytest.mark.parametrize("name", sorted(n for n in FOUND if n.startswith("engine")))
def test_the_engine_knows_no_redis(name: str) -> None:
    assert not {part.partition(".")[0] for part in imports(modules()[name])} & {"redis", "rq"}


def test_sampling_knows_no_sequence_and_a_batch_neither() -> None:
    for module in ("engine.batch", *(n for n in FOUND if n.startswith("engine.sampling"))):
        assert not [name for name in FOUND[module] if name.startswith("engine.requests")]


def loaded_by(statement: str) -> set[str]:
    """The top-level modules in memory after the statement."""
    script = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(told.stdout.split())


def test_the_whole_of_queue_api_loads_no_torch() -> None:
    names = [name for name in FOUND if name.startswith("queue_api")]
    everything = "\n".join(f"import {name}" for name in names)
    assert loaded_by(everything) & HEAVY == set()


def test_the_wire_models_load_neither_redis_nor_rq() -> None:
    names = [name for name in FOUND if name.startswith("queue_api.wire")]
    loaded = loaded_by("\n".join(f"import {name}" for name in names))
    assert loaded & {"redis", "rq", "typer", *HEAVY} == set()


def test_the_picture_of_the_floors_is_of_these_imports() -> None:
    drawn = runpy.run_path(str(ROOT / "docs/draw_floors.py"))["draw"](FOUND)
    kept = (ROOT / "docs/floors.svg").read_text(encoding="utf-8")
    assert kept == drawn, "imports have changed: run `make floors`"


def test_an_import_between_wings_is_in_the_picture() -> None:
    draw = runpy.run_path(str(ROOT / "docs/draw_floors.py"))["draw"]
    pair = ("engine.scheduling.scheduler", "engine.kernels.malloc")
    planted = FOUND | {pair[0]: FOUND[pair[0]] | {pair[1]}}
    assert draw(planted) != draw(FOUND)


# ------------------------------------------------------------------------------------ the face


def test_what_batchmill_offers_is_there() -> None:
    assert batchmill.__all__ == sorted(batchmill.__all__)
    for name in batchmill.__all__:
        offered = getattr(batchmill, name)
        assert offered.__name__ == name
        assert getattr(importlib.import_module(offered.__module__), name) is offered
    assert set(batchmill.__all__) <= set(dir(batchmill))
    with pytest.raises(AttributeError, match="nothing"):
        batchmill.nothing  # noqa: B018


def test_it_offers_every_error_and_none_is_named_as_one_of_redis_py() -> None:
    import redis

    assert set(errors.__all__) <= set(batchmill.__all__)
    foreign = {*dir(redis), *dir(redis.exceptions)}
    assert not foreign & set(errors.__all__)


def test_the_face_loads_no_torch() -> None:
    everything = f"from batchmill import {', '.join(batchmill.__all__)}"
    assert loaded_by(everything) & HEAVY == set()


def test_each_wing_says_what_it_is() -> None:
    for name, path in modules().items():
        if path.name == "__init__.py" and name.count(".") == 1:
            said = importlib.import_module(name).__doc__ or ""
            assert "Begin with" in said, f"{name} says what it is, may import, and where to begin"
