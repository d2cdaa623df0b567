"""How sequences end: which token or stop string ends one, and the completion that follows."""

from __future__ import annotations

import time
from dataclasses import dataclass

from engine.models.tokenizer import Tokenizer
from engine.requests.completion import Completion
from engine.requests.detokenizer import Detokenizer
from engine.requests.sequence import Sequence
from engine.requests.stop_strings import FoundStop, StopSearch
from engine.sampling.logprobs import described
from queue_api.wire.schemas import FinishReason, TokenLogprobs

__all__ = ["Ending", "complete", "ending_of", "fail"]


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a sequence ends."""

    reason: FinishReason
    text: str | None = None
    """The new text where a stop string makes the cut; None: all of it stays."""


def ending_of(sequence: Sequence, tokenizer: Tokenizer) -> Ending | None:
    """Why the sequence ends with its last token; None if it goes on."""
    sampling = sequence.sampling
    last = int(sequence.token_ids[sequence.num_tokens - 1])
    if last in sampling.stop_token_ids:
        return Ending(FinishReason.STOP)
    if not sampling.ignore_eos and last in tokenizer.eos_token_ids:
        return Ending(FinishReason.STOP)
    if sequence.grammar is not None and sequence.grammar.is_over:
        return Ending(FinishReason.STOP)
    if sampling.stop and (found := _find_stop(sequence, tokenizer)) is not None:
        keeps_it = sampling.include_stop_str_in_output
        return Ending(FinishReason.STOP, found.before + (found.string if keeps_it else ""))
    if sequence.num_tokens == sequence.capacity:
        return Ending(FinishReason.LENGTH)
    return None


def _find_stop(sequence: Sequence, tokenizer: Tokenizer) -> FoundStop | None:
    sampling = sequence.sampling
    if sequence.stops is None:
        sequence.stops = StopSearch(
            tokenizer,
            sequence.prompt(),
            sampling.stop,
            sampling.min_tokens,
            may_begin_in_prompt="stop_strings" in sequence.applied_defaults,
        )
    return sequence.stops.read(sequence.generated(sequence.stops.num_read))


def _text(sequence: Sequence, tokenizer: Tokenizer) -> str:
    return Detokenizer(tokenizer, sequence.prompt()).text(sequence.generated())


def complete(sequence: Sequence, ending: Ending, tokenizer: Tokenizer) -> Completion:
    """The completion of a sequence that ended by itself; an error if it can't be decoded."""
    try:
        words = _text(sequence, tokenizer) if ending.text is None else ending.text
        return _completion(sequence, ending.reason, tokenizer, words)
    except Exception as problem:  # of this sequence alone
        return _completion(sequence, FinishReason.ERROR, tokenizer, "", problem)


def fail(sequence: Sequence, error: BaseException, tokenizer: Tokenizer) -> Completion:
    """The completion of a sequence that can't go on: its text so far, and what was wrong."""
    try:
        words = _text(sequence, tokenizer)
    except Exception:
        words = ""
    return _completion(sequence, FinishReason.ERROR, tokenizer, words, error)


def _completion(
    sequence: Sequence,
    reason: FinishReason,
    tokenizer: Tokenizer,
    words: str,
    error: BaseException | None = None,
) -> Completion:
    tokens, grammar, logprobs = sequence.generated(), sequence.grammar, sequence.logprobs
    return Completion(
        key=sequence.key,
        text=words,
        token_ids=tokens,
        finish_reason=reason,
        prompt_tokens=sequence.num_prompt,
        completion_tokens=len(tokens),
        error=error,
        logprobs=None if logprobs is None else described(logprobs, tokenizer),
        prompt_logprobs=_described_prompt(sequence, tokenizer),
        applied_defaults=sequence.applied_defaults,
        structured_output=grammar.status(words) if grammar and error is None else None,
        added_at=sequence.added_at,
        admitted_at=sequence.admitted_at,
        first_token_at=sequence.first_token_at,
        finished_at=time.perf_counter(),
        stage_s=sequence.stage_s,
    )


def _described_prompt(
    sequence: Sequence, tokenizer: Tokenizer
) -> list[TokenLogprobs | None] | None:
    if sequence.prompt_logprobs is None:
        return None
    return [None, *described(sequence.prompt_logprobs, tokenizer)]
