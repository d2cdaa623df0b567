"""One request's tokens and status while the engine has it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.batch import CacheCopy
from engine.requests.guide import Guide
from engine.requests.stop_strings import StopSearch
from engine.sampling.logits import LogitsChange, SamplingRow
from engine.sampling.logprobs import Chosen
from engine.sampling.structured import GrammarState
from queue_api.wire.schemas import SamplingParams

__all__ = ["Sequence", "seed_from_key"]


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens and progress of one request.

    Invariant: `num_cached <= num_tokens <= capacity`; the tokens from `num_cached` on are still
    to be computed. One of them is a decode step, more are a prefill. While it runs,
    `num_cached <= num_slots <= capacity`.
    """

    key: str
    number: int
    """Unique in the engine, rising with arrival."""
    token_ids: npt.NDArray[np.int64]  # [capacity]; prompt, then generated, then free
    num_prompt: int
    num_tokens: int
    sampling: SamplingParams
    seed: int
    added_at: float
    stage_s: list[float]
    num_cached: int = 0
    sample: int = 0
    """Which of its request's samples, from 0; its draws depend on that."""
    first_slot: int = -1
    """Of the range of slots that it has while it runs, the same in every stage; -1 if it waits."""
    num_slots: int = 0
    """How long that range is."""
    copy: CacheCopy | None = None
    """What its micro-batch copies first: another's cache where it begins, its own if it moves."""
    in_flight: bool = False
    """Part of a micro-batch that hasn't come back."""
    is_preempted: bool = False
    """It ran, was preempted, and waits to be recomputed."""
    num_overtaken: int = 0
    """How many that arrived later were admitted before it."""
    is_long: bool = False
    """LongRoPE's long factors rotate it from its first token on: its cache is another."""
    is_cancelled: bool = False
    admitted_at: float | None = None
    first_token_at: float | None = None
    change: LogitsChange | None = None
    """What the request does to its logits; None if nothing."""
    applied_defaults: tuple[str, ...] = ()
    """The fields of the model's generation config that have a part in it."""
    grammar: GrammarState | None = None
    """Set before admission if the request asks for structured output."""
    stops: StopSearch | None = None
    """Set with its first new token if the request names stop strings."""
    logprobs: list[Chosen] | None = None
    """One per new token; None if the request doesn't ask for them."""
    prompt_logprobs: list[Chosen] | None = None
    """Of the prompt's tokens from the second on, as far as they are known; None if not wanted."""
    guide: Guide | None = None
    """What it is to follow, where a text that is written already is made again."""

    @property
    def capacity(self) -> int:
        return len(self.token_ids)

    @property
    def num_pending(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return self.num_tokens - self.num_cached

    @property
    def num_to_come(self) -> int:
        """New tokens, at most: as many steps. A prompt takes few, for it is computed in chunks."""
        return self.capacity - self.num_tokens

    @property
    def scores_prompt(self) -> bool:
        """Logits of the prompt are still wanted, so no part of it may come from a cache."""
        known = self.prompt_logprobs
        return known is not None and len(known) < self.num_prompt - 1

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt

    def prompt(self) -> list[int]:
        tokens: list[int] = self.token_ids[: self.num_prompt].tolist()
        return tokens

    def generated(self, begin: int = 0) -> list[int]:
        """The new tokens so far from `begin` on, those it was resumed with included."""
        tokens: list[int] = self.token_ids[self.num_prompt + begin : self.num_tokens].tolist()
        return tokens

    def sampling_row(self) -> SamplingRow:
        """What its next token is chosen from, beside the logits."""
        return SamplingRow(
            self.token_ids[: self.num_tokens],
            self.num_prompt,
            self.sampling,
            self.seed,
            self.sample,
            self.change,
            self.grammar,
        )

    def append(self, token_id: int) -> None:
        self.token_ids[self.num_tokens] = token_id
        self.num_tokens += 1

    @classmethod
    def create(
        cls,
        key: str,
        number: int,
        prompt: Seq[int],
        generated: Seq[int],
        sampling: SamplingParams,
        *,
        seed: int,
        sample: int = 0,
        added_at: float,
        num_stages: int,
        change: LogitsChange | None = None,
        applied_defaults: tuple[str, ...] = (),
        guide: Guide | None = None,
    ) -> Sequence:
        token_ids = np.zeros(len(prompt) + sampling.max_tokens, dtype=np.int64)
        num_tokens = len(prompt) + len(generated)
        token_ids[: len(prompt)] = prompt
        token_ids[len(prompt) : num_tokens] = generated
        stage_s = [0.0] * num_stages
        return cls(
            key,
            number,
            token_ids,
            len(prompt),
            num_tokens,
            sampling,
            seed,
            added_at,
            stage_s,
            sample=sample,
            change=change,
            applied_defaults=applied_defaults,
            guide=guide,
            logprobs=None if sampling.logprobs is None else [],
            # all samples have the same prompt
            prompt_logprobs=None if sampling.prompt_logprobs is None or sample else [],
        )


def seed_from_key(key: str) -> int:
    """A 64-bit seed for a request that names none; the same key always gives the same."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
