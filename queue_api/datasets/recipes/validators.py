"""Validator: whether a stage's text is what its recipe says it has to be."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from queue_api.datasets.recipes.recipe import Checks
from queue_api.wire.errors import ConfigurationError, MissingExtraError

if TYPE_CHECKING:
    from jsonschema.protocols import Validator as SchemaValidator

__all__ = ["ENTRY_POINTS", "Validator", "Verdict"]

ENTRY_POINTS = "batchmill_validators"
"""The group of entry points that a recipe's functions may be named in."""
MOST_REASON = 500
Function = Callable[[str, Mapping[str, Any]], object]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with a text; nothing if it is valid."""

    reason: str = ""
    can_repair: bool = True
    """Whether another text may be valid: not so where the validator itself fails."""

    @property
    def is_valid(self) -> bool:
        """True if nothing is."""
        return not self.reason


class Validator:
    """Checks texts; a function of a recipe's is called with the text and the row's columns, and
    returns None or True for a valid one, a reason or False for another.

    :raises ConfigurationError: a pattern, schema or function can't be used
    """

    def __init__(self, checks: Checks | None, stage: str) -> None:
        self._checks = checks or Checks()
        self._stage = stage
        self._pattern = self._compiled(self._checks.regex)
        self._schema = self._schema_of(self._checks.json_schema)
        self._functions = {name: self._found(name) for name in self._checks.function or ()}

    def judge(self, text: str, columns: Mapping[str, Any]) -> Verdict:
        """The first thing that is wrong with it."""
        if reason := self._plain_fault(text) or self._schema_fault(text):
            return Verdict(reason[:MOST_REASON])
        for name, function in self._functions.items():
            try:
                said = function(text, columns)
            except Exception as error:  # it is the user's
                failed = f"{name} failed: {type(error).__name__}: {error}"
                return Verdict(failed[:MOST_REASON], can_repair=False)
            if said is not None and said is not True:
                reason = str(said) if said else f"{name} says that it isn't valid"
                return Verdict(reason[:MOST_REASON])
        return Verdict()

    def _plain_fault(self, text: str) -> str:
        checks = self._checks
        if checks.min_length is not None and len(text) < checks.min_length:
            return f"it has {len(text)} characters; at least {checks.min_length} are asked for"
        if checks.max_length is not None and len(text) > checks.max_length:
            return f"it has {len(text)} characters; at most {checks.max_length} are asked for"
        if checks.one_of is not None and text.strip() not in checks.one_of:
            return f"it has to be one of {', '.join(checks.one_of)}"
        if self._pattern is not None and self._pattern.search(text) is None:
            return f"it doesn't match {checks.regex}"
        return ""

    def _schema_fault(self, text: str) -> str:
        if self._schema is None:
            return ""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"it isn't JSON: {error}"
        found = next(iter(self._schema.iter_errors(value)), None)
        return "" if found is None else f"{found.json_path}: {found.message}"

    def _compiled(self, pattern: str | None) -> re.Pattern[str] | None:
        try:
            return None if pattern is None else re.compile(pattern)
        except re.error as error:
            raise ConfigurationError(
                f"stage {self._stage!r}: the regex {pattern!r} can't be used: {error}"
            ) from None

    def _schema_of(self, schema: dict[str, Any] | None) -> SchemaValidator | None:
        if schema is None:
            return None
        try:
            from jsonschema import SchemaError
            from jsonschema.validators import validator_for
        except ImportError:
            raise MissingExtraError(
                "a recipe with a 'json_schema' needs the package jsonschema: "
                "pip install 'batchmill[structured]'"
            ) from None
        kind = validator_for(schema)
        try:
            kind.check_schema(schema)
        except SchemaError as error:
            raise ConfigurationError(
                f"stage {self._stage!r}: the json_schema can't be used: {error.message}"
            ) from None
        found: SchemaValidator = kind(schema)
        return found

    def _found(self, name: str) -> Function:
        try:
            for point in entry_points(group=ENTRY_POINTS, name=name):
                return _callable(point.load(), name)
            module, colon, attribute = name.partition(":")
            if not colon:
                known = sorted(point.name for point in entry_points(group=ENTRY_POINTS))
                raise ConfigurationError(
                    f"write it as package.module:name; as entry points of {ENTRY_POINTS} there are "
                    f"{', '.join(known) or 'none'}"
                )
            return _callable(getattr(importlib.import_module(module), attribute), name)
        except (ImportError, AttributeError, ConfigurationError) as error:
            raise ConfigurationError(
                f"stage {self._stage!r}: no function {name!r}: {error}"
            ) from None


def _callable(found: object, name: str) -> Function:
    if not callable(found):
        raise ConfigurationError(f"{name} isn't a function")
    return found
