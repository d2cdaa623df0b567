"""Structured output: grammars are compiled in threads, and mask logits at each step.

xgrammar, an optional dependency, compiles what was asked for over the model's tokens and says at
each step which tokens may come next (Dong et al. 2024, "XGrammar"). A text's state follows from
its tokens alone, so it is the same in every batch and partition and after a resumption.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engine.models.tokenizer import Tokenizer
from engine.sampling.json_check import JsonCheck
from engine.transfer import moved
from queue_api.wire.errors import InvalidRequestError, UnsupportedRequestError
from queue_api.wire.schemas import StructuredOutputs, StructuredOutputStatus

__all__ = ["Grammar", "GrammarState", "Grammars"]

COMPILE_LIMIT_S = 30.0
MAX_COMPILING = 2
MAX_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar, shared by all sequences that have it."""

    compiled: Any  # xgrammar.CompiledGrammar
    check: JsonCheck | None
    ends_itself: bool
    """The model has no end-of-text token: a text ends as soon as it can't be continued."""

    def begin(self) -> GrammarState:
        return GrammarState(self, _matcher(self))


@dataclass(slots=True)
class GrammarState:
    """How far one text is within its grammar."""

    grammar: Grammar
    matcher: Any  # xgrammar.GrammarMatcher
    num_accepted: int = 0

    def accept(self, tokens: Seq[int]) -> None:
        """Follow the text's next tokens.

        :raises InvalidRequestError: if one of them can't stand there
        """
        for token in tokens:
            if not self.matcher.accept_token(token):
                raise InvalidRequestError(
                    f"token {token} at place {self.num_accepted} isn't allowed by the grammar"
                )
            self.num_accepted += 1

    @property
    def is_over(self) -> bool:
        """Nothing can follow."""
        return bool(self.matcher.is_terminated())

    def mask(self, scores: torch.Tensor) -> None:
        """Set `scores` [V] of tokens that can't come next to -inf, in place."""
        size = len(scores)
        bits = np.full((1, -(-size // 32)), -1, dtype=np.int32)
        if self.matcher.fill_next_token_bitmask(bits):
            allowed = np.unpackbits(bits[0].view(np.uint8), bitorder="little")[:size]
            refused = moved(torch.from_numpy(allowed == 0), scores.device)
            scores.masked_fill_(refused, float("-inf"))

    def status(self, text: str) -> StructuredOutputStatus:
        """Judge the final text, by itself: a stop string may have cut it."""
        matcher = _matcher(self.grammar)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a part of a character at the end
        if not matcher.accept_string(whole):
            return StructuredOutputStatus.INVALID
        if whole != text or not matcher.is_completed():
            return StructuredOutputStatus.TRUNCATED
        if self.grammar.check is not None and not self.grammar.check.passes(text):
            return StructuredOutputStatus.INVALID
        return StructuredOutputStatus.VALID


def _matcher(grammar: Grammar) -> Any:
    from xgrammar import GrammarMatcher

    return GrammarMatcher(grammar.compiled, terminate_without_stop_token=grammar.ends_itself)


@dataclass(slots=True)
class _Compiling:
    started_at: float
    done: threading.Event = field(default_factory=threading.Event)
    outcome: Grammar | str = ""
    """The grammar, or what is wrong with it."""


class Grammars:
    """Compiles grammars, each in a thread beside the steps, and keeps those used last.

    Compilation can't be interrupted: one that takes too long goes on in its thread, and at most
    `MAX_COMPILING` run at once, but no request waits longer than `compile_limit_s`.
    """

    def __init__(self, tokenizer: Tokenizer, *, compile_limit_s: float = COMPILE_LIMIT_S) -> None:
        self._tokenizer = tokenizer
        self.compile_limit_s = compile_limit_s
        self._compiler: Any = None
        self._places = threading.Semaphore(MAX_COMPILING)
        self._compiling: dict[str, _Compiling] = {}
        self._cache: OrderedDict[str, Grammar | str] = OrderedDict()
        self._sizes: dict[str, int] = {}  # bytes of what is in the cache

    def order(self, outputs: StructuredOutputs) -> None:
        """See that the grammar will be there.

        :raises UnsupportedRequestError: if this worker can't compile grammars
        """
        self._require_compiler()
        self._collect()
        key = outputs.key
        if key not in self._cache and key not in self._compiling:
            job = self._compiling[key] = _Compiling(time.perf_counter())
            threading.Thread(
                target=self._compile, args=(outputs, job), name="compile-grammar", daemon=True
            ).start()

    def get(self, outputs: StructuredOutputs) -> Grammar | None:
        """The grammar that was ordered; None if it isn't there yet.

        :raises InvalidRequestError: if it is wrong, or takes too long to compile
        """
        self._collect()
        key = outputs.key
        if (outcome := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            if isinstance(outcome, str):
                raise InvalidRequestError(outcome)
            return outcome
        if (job := self._compiling.get(key)) is None:
            self.order(outputs)  # others have pushed it out of the cache
        elif time.perf_counter() - job.started_at > self.compile_limit_s:
            raise InvalidRequestError(
                f"'structured_outputs' took longer than {self.compile_limit_s:g} s to compile: "
                "make it simpler"
            )
        return None

    def wait(self, timeout_s: float) -> None:
        """Until one of those that are compiled is there, or the time is over."""
        for job in list(self._compiling.values())[:1]:
            job.done.wait(timeout_s)

    def _collect(self) -> None:
        """Put what is compiled into the cache, and what was used longest ago out of it."""
        ready = [key for key, job in self._compiling.items() if job.done.is_set()]
        for key in ready:
            outcome = self._cache[key] = self._compiling.pop(key).outcome
            size = 0 if isinstance(outcome, str) else int(outcome.compiled.memory_size_bytes)
            self._sizes[key] = len(key) + size
        while len(self._cache) > 1 and sum(self._sizes.values()) > MAX_CACHE_BYTES:
            key, _ = self._cache.popitem(last=False)
            del self._sizes[key]

    def _require_compiler(self) -> None:
        if self._compiler is not None:
            return
        try:
            import jsonschema  # noqa: F401
            import xgrammar
        except ImportError as error:
            raise UnsupportedRequestError(
                f"'structured_outputs' needs {error.name}, which this worker doesn't have: "
                "pip install 'batchmill[structured]'"
            ) from error
        self._compiler = xgrammar.GrammarCompiler(
            self._tokenizer.for_grammars(), max_threads=1, cache_enabled=False
        )

    def _compile(self, outputs: StructuredOutputs, job: _Compiling) -> None:
        try:
            with self._places:
                check = None if outputs.json is None else JsonCheck.of(outputs.json)
                compiled = self._compiled(outputs)
            job.outcome = Grammar(compiled, check, not self._tokenizer.eos_token_ids)
        except InvalidRequestError as error:
            job.outcome = str(error)
        except Exception as error:  # xgrammar raises all sorts
            said = " ".join(str(error).split(": ", 1)[-1].split())[:300]
            job.outcome = f"'structured_outputs' can't be compiled: {said}"
        finally:
            job.done.set()

    def _compiled(self, outputs: StructuredOutputs) -> Any:
        # One layout, as of json.dumps: free to, a model may write blanks up to its last token.
        if outputs.json is not None:
            return self._compiler.compile_json_schema(outputs.json, any_whitespace=False)
        if outputs.json_object:
            return self._compiler.compile_json_schema(
                {"type": "object"}, any_whitespace=False, strict_mode=False
            )
        if outputs.regex is not None:
            return self._compiler.compile_regex(outputs.regex)
        if outputs.choice is not None:
            return self._compiler.compile_grammar(_choice_grammar(outputs.choice))
        return self._compiler.compile_grammar(outputs.grammar)


def _choice_grammar(choices: Seq[str]) -> str:
    quoted = ('"' + "".join(map(_escaped, choice)) + '"' for choice in choices)
    return "root ::= " + " | ".join(quoted)


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"
