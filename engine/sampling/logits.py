"""What a request's sampling fields do to its logits before a token is chosen.

The order and the meaning are vLLM's: bad words, biases, endings that come too early, then what
the model's generation config asks for, then the penalties for repetition, frequency and presence;
last, what the grammar doesn't allow goes out. All is computed from the tokens there are, so a
resumed sequence is treated as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.models.tokenizer import Tokenizer
from engine.sampling.model_defaults import Processor
from engine.sampling.structured import GrammarState
from engine.transfer import moved
from queue_api.wire.errors import InvalidRequestError
from queue_api.wire.schemas import SamplingParams

__all__ = ["LogitsChange", "SamplingRow", "change_logits"]

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class LogitsChange:
    """The changes that one request asks for."""

    sampling: SamplingParams
    bad_words: tuple[tuple[int, ...], ...]
    """Token sequences whose last token is forbidden behind the others."""
    ending_ids: tuple[int, ...]
    """Forbidden as long as there are fewer than min_tokens new tokens."""
    processors: tuple[Processor, ...] = ()
    """The model's own."""

    @classmethod
    def of(
        cls,
        sampling: SamplingParams,
        tokenizer: Tokenizer,
        processors: tuple[Processor, ...] = (),
    ) -> LogitsChange | None:
        """None if the logits stay as they are.

        :raises InvalidRequestError: a biased token id that the model doesn't have, or a bad word
            that can't be tokenized
        """
        size = tokenizer.vocab_size
        for token in sampling.logit_bias:
            if token >= size:
                raise InvalidRequestError(
                    f"token id {token} in 'logit_bias' is outside the vocabulary (0 to {size - 1})"
                )
        endings: tuple[int, ...] = ()
        if sampling.min_tokens:
            ids = tokenizer.eos_token_ids.union(sampling.stop_token_ids)
            endings = tuple(sorted(token for token in ids if token < size))
        words = map(tuple, tokenizer.encode_bad_words(sampling.bad_words))
        # a tokenizer may know tokens that the model can't choose
        bad_words = tuple(word for word in words if max(word) < size)
        penalties = (sampling.presence_penalty, sampling.frequency_penalty)
        if (
            not (endings or bad_words or sampling.logit_bias or any(penalties) or processors)
            and sampling.repetition_penalty == 1.0
        ):
            return None
        return cls(sampling, bad_words, endings, processors)

    def apply(
        self, scores: torch.Tensor, token_ids: npt.NDArray[np.int64], num_prompt: int
    ) -> None:
        """Change `scores` [V], float32, in place.

        :param token_ids: [L] int64, the prompt's `num_prompt` tokens, then the new ones
        """
        new = token_ids[num_prompt:]  # [N]
        for word in self.bad_words:
            begin = len(new) - len(word) + 1
            if begin >= 0 and tuple(new[begin:].tolist()) == word[:-1]:
                scores[word[-1]] = _NEVER
        if bias := self.sampling.logit_bias:
            ids = moved(torch.tensor(list(bias)), scores.device)
            scores[ids] += moved(torch.tensor(list(bias.values())), scores.device)
        if len(new) < self.sampling.min_tokens and self.ending_ids:
            scores[moved(torch.tensor(self.ending_ids), scores.device)] = _NEVER
        if self.processors:
            ids, changed = _on(scores, token_ids)[None], scores[None]  # [1, L], [1, V]
            for processor in self.processors:
                changed = processor(ids, changed)
            scores.copy_(changed[0])
        self._penalize(scores, token_ids, new)

    def _penalize(
        self,
        scores: torch.Tensor,
        token_ids: npt.NDArray[np.int64],
        new: npt.NDArray[np.int64],
    ) -> None:
        sampling = self.sampling
        if (penalty := sampling.repetition_penalty) != 1.0:
            ids = _on(scores, np.unique(token_ids))
            seen = scores[ids]
            scores[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            unique, counts = np.unique(new, return_counts=True)
            off = counts * sampling.frequency_penalty + sampling.presence_penalty
            scores[_on(scores, unique)] -= _on(scores, off).to(scores.dtype)


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What a row of logits belongs to: its tokens so far, and what was asked for."""

    token_ids: npt.NDArray[np.int64]  # [L]; the prompt, then the new tokens
    num_prompt: int
    sampling: SamplingParams
    seed: int
    sample: int
    """Which of its request's samples, from 0."""
    change: LogitsChange | None
    grammar: GrammarState | None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt


def change_logits(logits: torch.Tensor, rows: Seq[SamplingRow]) -> torch.Tensor:
    """`logits` [B, V] with each row's changes; the same tensor if there are none."""
    wanted = [i for i, row in enumerate(rows) if row.change is not None or row.grammar is not None]
    if not wanted:
        return logits
    changed = logits.to(torch.float32, copy=True)
    for i in wanted:
        row = rows[i]
        if row.change is not None:
            row.change.apply(changed[i], row.token_ids, row.num_prompt)
        if row.grammar is not None:
            row.grammar.mask(changed[i])
    return changed


def _on(scores: torch.Tensor, values: npt.NDArray[Any]) -> torch.Tensor:
    return moved(torch.from_numpy(values), scores.device)
