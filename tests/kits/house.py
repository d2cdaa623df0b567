"""The house as it is meant to be, and who imports what in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HOUSE: dict[str, list[tuple[str, ...]]] = {
    "batchmill": [
        ("__main__",),
        ("commands",),
        ("offline",),
        ("hidden_password", "own_packages", "__init__"),
    ],
    "workers": [
        ("worker", "service", "maintenance"),
        ("rq_side",),
        ("claim",),
        ("running",),
        ("leases", "patience", "settings", "__init__"),
        ("scripts",),
    ],
    "engine": [
        ("engine", "loading"),
        ("planning",),
        ("stages",),
        ("scheduling",),
        ("requests",),
        ("sampling",),
        ("weights",),
        ("models",),
        ("attention",),
        ("kernels",),
        ("demo_model",),
        ("config", "control_group", "plan", "batch", "transfer", "metrics", "__init__"),
    ],
    "queue_api": [
        ("datasets",),
        ("client",),
        ("store",),
        ("connection",),
        ("wire",),
        ("__init__",),
    ],
}
"""Each floor's wings, top to bottom: folders, and files that belong together."""
REACH: dict[str, tuple[str, ...]] = {
    "batchmill": ("batchmill", "workers", "engine", "queue_api"),
    "workers": ("workers", "engine", "queue_api"),
    "engine": ("engine", "queue_api.wire"),
    "queue_api": ("queue_api",),
}
"""What a floor may import of the house."""

Graph = Mapping[str, frozenset[str]]
"""By module: the modules of the house that it imports."""


def wing_of(module: str) -> str | None:
    """Floor and wing of a module, such as `engine.stages`; None if the house has no such place."""
    floor, _, rest = module.partition(".")
    name = rest.partition(".")[0] or "__init__"
    for names in HOUSE.get(floor, ()):
        if name in names:
            return f"{floor}.{names[0]}"
    return None


WINGS = [f"{floor}.{names[0]}" for floor, wings in HOUSE.items() for names in wings]
"""All of them, the topmost first."""


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, anywhere in it; with `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(root: Path = ROOT) -> dict[str, Path]:
    """All modules of the house by name."""
    found = {}
    for floor in HOUSE:
        for path in sorted((root / floor).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    assert found
    return found


def graph(root: Path = ROOT) -> dict[str, frozenset[str]]:
    """Who imports whom within the house."""
    paths = modules(root)
    return {
        name: frozenset(other for other in imports(path) if other in paths and other != name)
        for name, path in paths.items()
    }


def faults(found: Graph) -> list[str]:
    """What isn't as it is meant to be: imports that run up, modules without a place, circles."""
    said = []
    for module, others in found.items():
        wing = wing_of(module)
        if wing is None:
            said.append(f"{module} has no place in the house")
            continue
        for other in sorted(others):
            target = wing_of(other)
            reach = REACH[module.partition(".")[0]]
            if not any(other == place or other.startswith(f"{place}.") for place in reach):
                said.append(f"{module} may not import {other}: not within its floor's reach")
            elif target is not None and WINGS.index(target) < WINGS.index(wing):
                said.append(f"{module} imports up: {other}")
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        said.append(f"a circle: {' -> '.join(error.args[1])}")
    return said
