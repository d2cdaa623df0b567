"""Whether a JSON text obeys its schema, also in what a grammar can't express.

A grammar leaves out some of a schema (`uniqueItems`, `not`, `$ref` with others beside it, a
`pattern` beside an `enum`, look-around in one, …); jsonschema, the reference in Python, judges the
finished text by all of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from engine.sampling.compile_grammar import NO_SCHEMAS
from queue_api.wire.errors import InvalidRequestError

__all__ = ["JsonCheck"]

MAX_RULES = 50_000


class _TooMuchError(Exception):
    """More rules were applied than a check may take."""


@dataclass(frozen=True, slots=True)
class JsonCheck:
    """A schema, ready to judge texts."""

    schema: dict[str, Any]
    validator: Any
    """The validator class of the schema's draft; 2020-12 unless it names another."""
    has_patterns: bool
    """Python's regular expressions may take exponential time over a text: check it where that can
    be killed."""

    @classmethod
    def of(cls, schema: dict[str, Any]) -> JsonCheck:
        """:raises InvalidRequestError: if it isn't a JSON schema"""
        from jsonschema import SchemaError

        check = cls.trusted(schema)
        try:
            check.validator.check_schema(schema)
        except SchemaError as error:
            place = "".join(f"[{part!r}]" for part in error.absolute_path)
            raise InvalidRequestError(
                f"'structured_outputs': 'json' isn't a JSON schema{': at ' if place else ''}"
                f"{place}: {error.message[:200]}"
            ) from None
        return check

    @classmethod
    def trusted(cls, schema: dict[str, Any]) -> JsonCheck:
        """Of a schema that `of` found to be one."""
        from jsonschema import Draft202012Validator, validators

        validator = validators.validator_for(schema, default=Draft202012Validator)
        return cls(schema, validator, any(True for _ in _patterns(schema)))

    def passes(self, text: str) -> bool:
        """False also where the check would take too long, or can't be made."""
        from jsonschema import validators
        from referencing import Registry

        budget = [MAX_RULES]
        rules = {name: _counted(rule, budget) for name, rule in self.validator.VALIDATORS.items()}
        checker = validators.extend(self.validator, rules)
        try:
            # an empty registry: nothing is fetched
            return bool(checker(self.schema, registry=Registry()).is_valid(json.loads(text)))
        except Exception:  # not JSON, a reference to nowhere or to itself, too many rules
            return False


def _patterns(schema: object) -> Iterator[str]:
    """Every regular expression in a schema."""
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack += node
        elif isinstance(node, dict):
            for name, value in node.items():
                if name == "pattern" and isinstance(value, str):
                    yield value
                elif name == "patternProperties" and isinstance(value, dict):
                    yield from value
                if name not in NO_SCHEMAS:
                    stack.append(value)


def _counted(rule: Callable[..., Any], budget: list[int]) -> Callable[..., Any]:
    def apply(*args: Any) -> Any:
        budget[0] -= 1
        if budget[0] < 0:
            raise _TooMuchError
        return rule(*args)

    return apply
