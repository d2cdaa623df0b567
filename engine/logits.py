"""What a request's sampling fields do to its logits before a token is chosen.

The order and the meaning are vLLM's: bad words, biases, endings that come too early, then the
penalties for repetition, frequency and presence; last, what isn't of the form asked for goes out.
All is computed from the tokens there are, so a resumed text is treated as one that was never
interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from engine.tokenizer import Tokenizer
from engine.transfer import moved
from queue_api.errors import InvalidRequestError
from queue_api.schemas import SamplingParams

if TYPE_CHECKING:
    from engine.sequence import Sequence

__all__ = ["LogitsChange", "change_logits"]

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class LogitsChange:
    """The changes that one request asks for."""

    sampling: SamplingParams
    bad_words: tuple[tuple[int, ...], ...]
    """Token sequences whose last token is forbidden behind the others."""
    ending_ids: tuple[int, ...]
    """Forbidden as long as there are fewer than min_tokens new tokens."""

    @classmethod
    def of(cls, sampling: SamplingParams, tokenizer: Tokenizer) -> LogitsChange | None:
        """None if the request leaves its logits as they are.

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
            not (endings or bad_words or sampling.logit_bias or any(penalties))
            and sampling.repetition_penalty == 1.0
        ):
            return None
        return cls(sampling, bad_words, endings)

    def apply(self, scores: torch.Tensor, text: Sequence) -> None:
        """Change `scores` [V], float32, in place."""
        new = text.token_ids[text.num_prompt : text.num_tokens]  # [N]
        for word in self.bad_words:
            begin = len(new) - len(word) + 1
            if begin >= 0 and tuple(new[begin:].tolist()) == word[:-1]:
                scores[word[-1]] = _NEVER
        if bias := self.sampling.logit_bias:
            ids = moved(torch.tensor(list(bias)), scores.device)
            scores[ids] += moved(torch.tensor(list(bias.values())), scores.device)
        if len(new) < self.sampling.min_tokens and self.ending_ids:
            scores[moved(torch.tensor(self.ending_ids), scores.device)] = _NEVER
        self._penalize(scores, text)

    def _penalize(self, scores: torch.Tensor, text: Sequence) -> None:
        sampling = self.sampling
        if (penalty := sampling.repetition_penalty) != 1.0:
            ids = _on(scores, np.unique(text.token_ids[: text.num_tokens]))
            seen = scores[ids]
            scores[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            new = text.token_ids[text.num_prompt : text.num_tokens]
            unique, counts = np.unique(new, return_counts=True)
            off = counts * sampling.frequency_penalty + sampling.presence_penalty
            scores[_on(scores, unique)] -= _on(scores, off).to(scores.dtype)


def change_logits(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """`logits` [B, V] with each sequence's changes; the same tensor if there are none."""
    rows = [row for row, s in enumerate(sequences) if s.change is not None or s.form is not None]
    if not rows:
        return logits
    changed = logits.to(torch.float32, copy=True)
    for row in rows:
        text = sequences[row]
        if text.change is not None:
            text.change.apply(changed[row], text)
        if text.form is not None:
            text.form.mask(changed[row])
    return changed


def _on(scores: torch.Tensor, values: npt.NDArray[Any]) -> torch.Tensor:
    return moved(torch.from_numpy(values), scores.device)
