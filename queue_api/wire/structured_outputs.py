"""StructuredOutputs: what a text must match, under vLLM's names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

__all__ = ["StructuredOutputs", "from_response_format", "parsed"]

MAX_SCHEMA_BYTES = 64 * 2**10
MAX_SCHEMA_DEPTH = 64
MAX_REGEX_CHARS = 4096
MAX_GRAMMAR_CHARS = 64 * 2**10
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 512


def parsed(value: object) -> object:
    """Let a schema be a string, as vLLM does."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"isn't JSON: {str(error)[:80]}") from None


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})
class StructuredOutputs:
    """What a text must match: exactly one of the fields. Names and meanings are vLLM's."""

    json: Annotated[dict[str, Any] | None, BeforeValidator(parsed)] = None
    """A JSON schema, as an object or a string; the new text is JSON that it accepts."""
    json_object: bool | None = None
    """True: any JSON object."""
    regex: Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARS)] | None = None
    """The whole of the text matches it."""
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARS)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
        | None
    ) = None
    """The text is one of these."""
    grammar: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)] | None = None
    """A context-free grammar in GBNF, llama.cpp's notation of EBNF; its start is `root`."""

    @model_validator(mode="after")
    def _check(self) -> StructuredOutputs:
        kinds = (self.json, self.json_object or None, self.regex, self.choice, self.grammar)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("give exactly one of json, json_object, regex, choice and grammar")
        if self.json is not None:
            _check_schema(self.json)
        return self

    @property
    def key(self) -> str:
        """The same for the same grammar, and only for it."""
        return json.dumps(
            [self.json, bool(self.json_object), self.regex, self.choice, self.grammar]
        )


def _check_schema(schema: dict[str, Any]) -> None:
    """Refuse what would cost a worker much, or have it fetch something."""
    for depth, node in _nodes(schema):
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"'json' is nested deeper than {MAX_SCHEMA_DEPTH} levels")
        ref = node.get("$ref") if isinstance(node, dict) else None
        if isinstance(ref, str) and not ref.startswith("#"):
            raise ValueError(f"'json' refers to {ref!r:.80}: only references within it ('#…') work")
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"'json' takes {size} bytes; the limit is {MAX_SCHEMA_BYTES}")


def _nodes(schema: object) -> Iterator[tuple[int, object]]:
    """Every part of the schema and how deep it lies; a parent comes before its children."""
    stack = [(1, schema)]
    while stack:
        depth, node = stack.pop()
        yield depth, node
        if isinstance(node, dict):
            stack.extend((depth + 1, child) for child in node.values())
        elif isinstance(node, list):
            stack.extend((depth + 1, child) for child in node)


def from_response_format(value: object) -> dict[str, Any] | None:
    """What OpenAI's `response_format` means in our terms; None for plain text.

    :raises ValueError: if it isn't one
    """
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema" and isinstance(value, dict):
        described = value.get("json_schema")
        if isinstance(described, dict) and isinstance(described.get("schema"), dict):
            return {"json": described["schema"]}
        raise ValueError("'response_format' has no 'json_schema' with an object 'schema'")
    raise ValueError(
        f"'response_format' is {value!r:.60}: its 'type' must be text, json_object or json_schema"
    )
