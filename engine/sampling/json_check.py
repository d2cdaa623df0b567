"""Whether a JSON text obeys its schema, also in what a grammar can't express.

A grammar leaves out some of a schema (`uniqueItems`, `not`, `$ref` with others beside it, …);
jsonschema, the reference in Python, judges the finished text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from queue_api.wire.errors import InvalidRequestError

__all__ = ["JsonCheck"]

MAX_RULES = 50_000
# Python's regular expressions can take exponential time. The grammar sees to patterns, in linear
# time.
_PATTERNS = frozenset({"pattern", "patternProperties"})
_BY_PATTERNS = frozenset({"additionalProperties", "unevaluatedProperties"})


class _TooMuchError(Exception):
    """More rules were applied than a check may take."""


@dataclass(frozen=True, slots=True)
class JsonCheck:
    """A schema, ready to judge texts."""

    schema: dict[str, Any]
    validator: Any
    """The validator class of the schema's draft; 2020-12 unless it names another."""

    @classmethod
    def of(cls, schema: dict[str, Any]) -> JsonCheck:
        """:raises InvalidRequestError: if it isn't a JSON schema"""
        from jsonschema import Draft202012Validator, SchemaError, validators

        validator = validators.validator_for(schema, default=Draft202012Validator)
        try:
            validator.check_schema(schema)
        except SchemaError as error:
            place = "".join(f"[{part!r}]" for part in error.absolute_path)
            raise InvalidRequestError(
                f"'structured_outputs': 'json' isn't a JSON schema{': at ' if place else ''}"
                f"{place}: {error.message[:200]}"
            ) from None
        return cls(schema, validator)

    def passes(self, text: str) -> bool:
        """False also where the check would take too long, or can't be made."""
        from jsonschema import validators
        from referencing import Registry

        left_out = _PATTERNS
        if '"patternProperties"' in json.dumps(self.schema):
            left_out |= _BY_PATTERNS
        budget = [MAX_RULES]
        rules = {
            name: _passed if name in left_out else _counted(rule, budget)
            for name, rule in self.validator.VALIDATORS.items()
        }
        checker = validators.extend(self.validator, rules)
        try:
            # an empty registry: nothing is fetched
            return bool(checker(self.schema, registry=Registry()).is_valid(json.loads(text)))
        except Exception:  # not JSON, a reference to nowhere or to itself, too many rules
            return False


def _passed(*_: Any) -> None:
    """A rule that isn't checked."""


def _counted(rule: Callable[..., Any], budget: list[int]) -> Callable[..., Any]:
    def apply(*args: Any) -> Any:
        budget[0] -= 1
        if budget[0] < 0:
            raise _TooMuchError
        return rule(*args)

    return apply
