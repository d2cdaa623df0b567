"""Structured output: grammars are compiled in threads, and mask logits at each step.

xgrammar, an optional dependency, compiles what was asked for over the model's tokens and says at
each step which tokens may come next (Dong et al. 2024, "XGrammar"). A text's state follows from
its tokens alone, so it is the same in every batch and partition and after a resumption.

Compilation can't be interrupted. So a grammar is first compiled in a process of its own, which is
killed when that takes too long or too much memory; what passes is compiled here, too, in a thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.models.tokenizer import Tokenizer
from engine.sampling.compile_grammar import compile_grammar_of, new_compiler
from engine.sampling.grammar_process import GrammarProcess, GrammarProcessError
from engine.sampling.json_check import JsonCheck
from engine.transfer import moved
from queue_api.wire.errors import InvalidRequestError, UnsupportedRequestError
from queue_api.wire.schemas import StructuredOutputs, StructuredOutputStatus

__all__ = ["Grammar", "GrammarState", "Grammars"]

logger = logging.getLogger(__name__)

COMPILE_LIMIT_S = 30.0
CHECK_LIMIT_S = 1.0
"""For one text's patterns. The steps wait for it; a schema that took so long is given up."""
MAX_LANES = 2
SECOND_LANE_AFTER_S = 1.0
"""A grammar that takes so long to compile has others compiled beside it."""
MAX_ORDERED = 1024
"""Forms that wait to be compiled; others are ordered when there is room."""
IDLE_S = 60.0
"""After so long without work the processes end: each takes the memory of torch's libraries."""
MAX_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar, shared by all sequences that have it."""

    compiled: Any  # xgrammar.CompiledGrammar
    check: Callable[[str], bool] | None
    """Whether a finished text is right also in what the grammar leaves out."""
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
        if self.grammar.check is not None and not self.grammar.check(text):
            return StructuredOutputStatus.INVALID
        return StructuredOutputStatus.VALID


def _matcher(grammar: Grammar) -> Any:
    from xgrammar import GrammarMatcher

    return GrammarMatcher(grammar.compiled, terminate_without_stop_token=grammar.ends_itself)


@dataclass(slots=True)
class _Order:
    outputs: StructuredOutputs
    outcome: Grammar | str | None = None
    """The grammar, or why there is none."""


class Grammars:
    """Compiles grammars, in order, beside the steps, and keeps those used last."""

    def __init__(self, tokenizer: Tokenizer, *, compile_limit_s: float = COMPILE_LIMIT_S) -> None:
        self._tokenizer = tokenizer
        self.compile_limit_s = compile_limit_s
        self._compiler: Any = None
        self._vocabulary = ""
        self._orders: dict[str, _Order] = {}
        self._lanes: set[_Lane] = set()
        self._waiting: deque[_Order] = deque()
        """Orders that no lane has taken up."""
        self._change = threading.Condition()
        """Held to change `_waiting` and `_lanes`; notified of orders and of outcomes."""
        self._checker = GrammarProcess()
        self._is_closed = False
        self._cache: OrderedDict[str, Grammar | str] = OrderedDict()
        self._sizes: dict[str, int] = {}  # bytes of what is in the cache

    def order(self, outputs: StructuredOutputs) -> None:
        """See that the grammar will be there.

        :raises UnsupportedRequestError: if this worker can't compile grammars
        """
        self._require_compiler()
        self._collect()
        self._order(outputs)

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
        # others have pushed it out of the cache, or there was no room for its order
        self._order(outputs)
        return None

    def wait(self, timeout_s: float) -> None:
        """Until one of those that are compiled is there, or the time is over."""
        with self._change:
            if not any(order.outcome for order in self._orders.values()):
                self._change.wait(timeout_s)

    def close(self) -> None:
        """End the processes."""
        with self._change:
            self._is_closed = True
            self._waiting.clear()
            lanes = list(self._lanes)
            self._change.notify_all()
        for lane in lanes:
            lane.process.kill()
        self._checker.kill()
        self._checker.close()

    def _order(self, outputs: StructuredOutputs) -> None:
        key = outputs.key
        if key not in self._cache and key not in self._orders and len(self._orders) < MAX_ORDERED:
            order = self._orders[key] = _Order(outputs)
            with self._change:
                self._waiting.append(order)
                self._change.notify_all()
        self._see_to_lanes()

    def _see_to_lanes(self) -> None:
        """Start a lane if orders wait that no other will take up soon."""
        late = time.perf_counter() - SECOND_LANE_AFTER_S
        with self._change:
            are_stuck = all(lane.busy_since < late for lane in self._lanes)
            if self._waiting and len(self._lanes) < MAX_LANES and are_stuck and not self._is_closed:
                lane = _Lane(GrammarProcess(self._vocabulary))
                self._lanes.add(lane)
                threading.Thread(
                    target=self._serve, args=(lane,), name="compile-grammars", daemon=True
                ).start()

    def _collect(self) -> None:
        """Put what is compiled into the cache, and what was used longest ago out of it."""
        ready = [key for key, order in self._orders.items() if order.outcome is not None]
        for key in ready:
            outcome = self._orders.pop(key).outcome
            assert outcome is not None
            self._cache[key] = outcome
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
            import xgrammar  # noqa: F401
        except ImportError as error:
            raise UnsupportedRequestError(
                f"'structured_outputs' needs {error.name}, which this worker doesn't have: "
                "pip install 'batchmill[structured]'"
            ) from error
        info = self._tokenizer.for_grammars()
        self._vocabulary = info.serialize_json()
        self._compiler = new_compiler(info)

    # --- in a lane's thread ------------------------------------------------------------------

    def _serve(self, lane: _Lane) -> None:
        """Take up orders until there have been none for a while."""
        try:
            while (order := self._next()) is not None:
                try:
                    order.outcome = self._outcome(lane, order)
                except Exception as error:  # the requests that wait for it are to hear of it
                    logger.exception("a grammar couldn't be compiled")
                    order.outcome = f"'structured_outputs' can't be compiled: {error!r}"
                with self._change:
                    lane.busy_since = float("inf")
                    self._change.notify_all()
        finally:
            with self._change:
                self._lanes.discard(lane)
            lane.process.close()

    def _next(self) -> _Order | None:
        with self._change:
            end_at = time.perf_counter() + IDLE_S
            while not self._waiting and not self._is_closed:
                if not self._change.wait(end_at - time.perf_counter()):
                    return None
            if self._is_closed:
                return None
            return self._waiting.popleft()

    def _outcome(self, lane: _Lane, order: _Order) -> Grammar | str:
        outputs = order.outputs
        try:
            lane.process.start()
        except GrammarProcessError as error:
            return f"'structured_outputs' can't be compiled: no process for it: {error}"
        begun_at = lane.busy_since = time.perf_counter()
        try:
            wrong = lane.process.ask({"outputs": outputs.key}, self.compile_limit_s)["wrong"]
        except GrammarProcessError:
            if time.perf_counter() - begun_at < self.compile_limit_s:
                return (
                    "'structured_outputs' takes too much memory to compile, or ends the compiler: "
                    "make it simpler"
                )
            return (
                f"'structured_outputs' took longer than {self.compile_limit_s:g} s to compile: "
                "make it simpler"
            )
        if wrong:
            return str(wrong)
        check = None if outputs.json is None else JsonCheck.trusted(outputs.json)
        passes = None if check is None else check.passes
        if check is not None and check.has_patterns:
            self._checker.start()
            passes = _PatternCheck(check.schema, self._checker).passes
        ends_itself = not self._tokenizer.eos_token_ids
        return Grammar(compile_grammar_of(self._compiler, outputs), passes, ends_itself)


class _Lane:
    """A thread that compiles grammars, one after another, with a process to try them in."""

    def __init__(self, process: GrammarProcess) -> None:
        self.process = process
        self.busy_since = float("inf")
        """When it took up what it compiles; never, if it waits."""


class _PatternCheck:
    """A JsonCheck whose patterns are tried in a process that can be killed."""

    def __init__(self, schema: dict[str, Any], process: GrammarProcess) -> None:
        self._schema = schema
        self._process = process
        self._is_given_up = False

    def passes(self, text: str) -> bool:
        """False also where that takes too long, then and for every later text."""
        if self._is_given_up:
            return False
        try:
            answer = self._process.ask({"schema": self._schema, "text": text}, CHECK_LIMIT_S)
        except GrammarProcessError as error:
            logger.warning("a text can't be checked against its schema's patterns: %s", error)
            self._is_given_up = True
            return False
        return bool(answer["passes"])
