"""A recipe's file: YAML, and what is wrong with it by its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from queue_api.datasets.recipes.recipe import Checks, Recipe, RecipeStage
from queue_api.wire.errors import ConfigurationError

__all__ = ["is_recipe", "read_recipe"]

MOST_BYTES = 1 << 20
MOST_NODES = 20_000
Place = tuple[str | int, ...]


def is_recipe(name: str) -> bool:
    """Whether a name is that of a recipe's file."""
    return name.lower().endswith((".yaml", ".yml"))


def read_recipe(path: Path | str) -> Recipe:
    """What the file says; names in it are relative to where the program runs, as on a command line.

    :raises ConfigurationError: it can't be read, or something in it is wrong; names the file, the
        line and what to write instead
    """
    try:
        raw = Path(path).read_bytes()
        if len(raw) > MOST_BYTES:
            raise ConfigurationError(f"{path} has {len(raw):,} bytes: no recipe is that long")
        text = raw.decode("utf-8-sig")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigurationError(f"can't read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} isn't UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(_not_yaml(path, error)) from None
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigurationError(
            f"{path} isn't a recipe: it begins with 'in: FILE', 'out: FILE' and 'stages:'"
        )
    lines: dict[Place, int] = {}
    for place, line in _lines(str(path), tree, ()):
        lines[place] = line
        if len(lines) > MOST_NODES:
            raise ConfigurationError(f"{path} has more than {MOST_NODES:,} values")
    try:
        return Recipe.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigurationError(_not_yaml(path, error)) from None
    except ValidationError as error:
        raise ConfigurationError(
            "\n".join(_told(path, lines, found) for found in error.errors()[:5])
        ) from None


def _not_yaml(path: Path | str, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark is not None else ""
    what = getattr(error, "problem", None) or type(error).__name__
    return f"{path}{where}: it isn't YAML: {what}"


def _lines(path: str, node: yaml.Node, place: Place) -> Iterator[tuple[Place, int]]:
    """Every value of the file and its line.

    :raises ConfigurationError: a key is there twice
    """
    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _lines(path, item, (*place, number))
    elif isinstance(node, yaml.MappingNode):
        seen = set[str]()
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise ConfigurationError(f"{path}, line {line}: {name!r} is there twice")
            seen.add(name)
            yield (*place, name), line
            yield from ((at, n) for at, n in _lines(path, value, (*place, name)) if at[-1] != name)


def _told(path: Path | str, lines: Mapping[Place, int], found: Any) -> str:
    place: Place = tuple(found["loc"])
    known = place
    while known and known not in lines:
        known = known[:-1]
    where = _named(known)
    return f"{path}, line {lines.get(known, 1)}: {where}{_what(place, found)}"


def _named(place: Place) -> str:
    shown = ""
    for part in place:
        shown += f"[{part + 1}]" if isinstance(part, int) else f"{'.' if shown else ''}{part}"
    return f"{shown}: " if shown else ""


def _what(place: Place, found: Any) -> str:
    kind, name = found["type"], str(place[-1]) if place else ""
    if kind == "extra_forbidden":
        names = _names(_part_of(place[:-1]))
        close = difflib.get_close_matches(name, names, 1)
        if close:
            return f"there is no such key; write {close[0]!r}"
        return f"there is no such key; there are {', '.join(names)}"
    if kind == "missing":
        return f"{name!r} is missing; write it as {_EXAMPLES.get(name, f'{name}: …')!r}"
    if kind == "value_error":
        return str(found["ctx"]["error"])
    given = found["input"]
    hint = ""
    if kind.startswith("string_type") and isinstance(given, bool | int | float):
        hint = f"; write it in quotes, '{str(given).lower()}'"
    return f"it is {given!r:.60}: {found['msg'][:1].lower()}{found['msg'][1:]}{hint}"


_EXAMPLES = {
    "in": "in: questions.jsonl",
    "out": "out: answers.jsonl",
    "name": "name: draft",
    "stages": "stages: [{name: answer, template: '{{ question }}'}]",
}


def _part_of(place: Place) -> type[BaseModel] | None:
    if not place:
        return Recipe
    if place[0] == "stages" and len(place) == 2:
        return RecipeStage
    if place[-1] == "validate":
        return Checks
    field = Recipe.model_fields.get(str(place[-1])) or RecipeStage.model_fields.get(str(place[-1]))
    kind = field.annotation if field is not None else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _names(part: type[BaseModel] | None) -> list[str]:
    if part is None:
        return []
    return [field.alias or name for name, field in part.model_fields.items()]
