"""How structured outputs become grammars; the same in the engine and in the process beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from queue_api.wire.structured_outputs import StructuredOutputs

__all__ = ["NO_SCHEMAS", "compile_grammar_of", "from_key", "new_compiler"]


def new_compiler(tokenizer_info: Any) -> Any:
    """An `xgrammar.GrammarCompiler` for a vocabulary (`xgrammar.TokenizerInfo`)."""
    from xgrammar import GrammarCompiler

    return GrammarCompiler(tokenizer_info, max_threads=1, cache_enabled=False)


def from_key(key: str) -> StructuredOutputs:
    """The structured outputs of this `StructuredOutputs.key`."""
    schema, is_object, regex, choice, grammar = json.loads(key)
    return StructuredOutputs(
        json=schema, json_object=is_object or None, regex=regex, choice=choice, grammar=grammar
    )


def compile_grammar_of(compiler: Any, outputs: StructuredOutputs) -> Any:
    """Their grammar, an `xgrammar.CompiledGrammar`.

    :raises Exception: of xgrammar's, if it can't be compiled
    """
    # One layout, as of json.dumps: free to, a model may write blanks up to its last token.
    if outputs.json is not None:
        return compiler.compile_json_schema(_bounded(outputs.json), any_whitespace=False)
    if outputs.json_object:
        return compiler.compile_json_schema(
            {"type": "object"}, any_whitespace=False, strict_mode=False
        )
    if outputs.regex is not None:
        return compiler.compile_regex(outputs.regex)
    if outputs.choice is not None:
        return compiler.compile_grammar(_choice_grammar(outputs.choice))
    return compiler.compile_grammar(outputs.grammar)


def _bounded(schema: Any) -> Any:
    """The schema with its patterns bounded by the `maxLength` beside them.

    xgrammar leaves out a `maxLength` beside a `pattern`, and a text would run on to its last token.
    No string that obeys both is lost: none repeats a part of it more often than it has characters.
    """
    if isinstance(schema, list):
        return [_bounded(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {name: part if name in NO_SCHEMAS else _bounded(part) for name, part in schema.items()}
    pattern, most = schema.get("pattern"), schema.get("maxLength")
    if isinstance(pattern, str) and type(most) is int and 0 < most <= MOST_REPEATS:
        copy["pattern"] = _REPEAT.sub(lambda match: _bounded_repeat(match, most), pattern)
    return copy


MOST_REPEATS = 1000
"""What a grammar is still made of fast."""
NO_SCHEMAS = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose values are data, whatever they look like."""
# an escape, a class, a group's beginning, or a repetition; the first three are left alone
_REPEAT = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?|(?P<any>[*+])|\{(?P<least>\d+),\}", re.DOTALL
)


def _bounded_repeat(match: re.Match[str], most: int) -> str:
    if (sign := match["any"]) is not None:
        return f"{{{int(sign == '+')},{most}}}"
    if (least := match["least"]) is not None:
        return f"{{{least},{max(int(least), most)}}}"
    return match[0]


def _choice_grammar(choices: Sequence[str]) -> str:
    quoted = ('"' + "".join(map(_escaped, choice)) + '"' for choice in choices)
    return "root ::= " + " | ".join(quoted)


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"
