"""Detokenizer: the text of new tokens as it stands behind their prompt, whole or as it grows.

A token's text depends on its neighbours: tokenizers like Llama 2's drop the blank of the first
token that they decode, a character may lie in several tokens, and byte tokens are read in runs.
So new tokens are decoded behind the prompt's last ones, and what these give alone is taken off;
while a text grows only a window of its last tokens is decoded, so a token costs the same in any
text. The technique is that of vLLM's `detokenize_incrementally`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from engine.models.tokenizer import Tokenizer

__all__ = ["Detokenizer"]

_OVERLAP = 8
"""Tokens with text that a window keeps: a character has at most four."""
_LONGEST_WINDOW = 64
_MOST_PENDING = 3
"""Tokens that a character may wait for."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The new tokens of one sequence as text. `text` is exact; `add` follows them one by one."""

    def __init__(self, tokenizer: Tokenizer, prompt: Seq[int]) -> None:
        self._tokenizer = tokenizer
        self._context = self._tail(prompt)
        self._window = list(self._context)
        self._num_pending = 0
        self._begun = self._texts_of_context()
        """The prompt's end as text, and the same without a character that lacks its own end."""
        self._before: Seq[str] = self._begun
        """The window's text at the last change, in as many ways; the first that fits counts."""

    def text(self, new: Seq[int]) -> str:
        """What `new` adds to the prompt's text, without special tokens."""
        whole = self._tokenizer.decode([*self._context, *filter(self._tokenizer.is_text, new)])
        return whole[_common(self._begun, whole)[1] :]

    def add(self, token: int) -> tuple[int, str]:
        """Take in the next new token; the change that it makes to the text.

        :returns: how many characters go from the text's end, seldom any, and those that come. A
            character comes when all of its tokens are there.
        """
        if not self._tokenizer.is_text(token):
            return 0, ""
        self._window.append(token)
        shown = self._tokenizer.decode(self._window)
        if self._is_pending(self._window, shown):
            self._num_pending += 1
            return 0, self._in_front_of_part(shown.rstrip(_REPLACEMENT))
        before, kept = _common(self._before, shown)
        self._num_pending = 0
        self._slide(shown)
        return len(before) - kept, shown[kept:]

    def _in_front_of_part(self, whole: str) -> str:
        """What a token adds that ends within a character, given the window's whole characters."""
        before, kept = _common(self._before, whole)
        if kept < len(before):
            return ""
        self._before = (whole,)
        return whole[kept:]

    def _slide(self, shown: str) -> None:
        """Begin the window later, where its text goes on being the end of `shown`."""
        self._before = (shown,)
        size = len(self._window)
        if size < 2 * _OVERLAP:
            return
        starts = [self._window[-count:] for count in range(_OVERLAP, _OVERLAP + _MOST_PENDING + 1)]
        ends = [self._tokenizer.decode(start) for start in starts]
        # not within a character, nor within a run of bytes that isn't text as a whole
        fits = [place for place, end in enumerate(ends) if end and shown.endswith(end)]
        if not fits and size >= _LONGEST_WINDOW:
            fits = [place for place, end in enumerate(ends) if end[:1] != _REPLACEMENT] or [0]
        if fits:
            self._window, self._before = starts[fits[0]], (ends[fits[0]],)

    def _tail(self, prompt: Seq[int]) -> list[int]:
        """The prompt's last tokens, at least so many that they have text."""
        count = 0
        tail: list[int] = []
        for token in reversed(prompt):
            if not self._tokenizer.is_text(token):
                continue
            tail.append(token)
            count += 1
            # looked at seldom: at 8, 16, 32, …
            if count >= _OVERLAP and count & (count - 1) == 0:
                text = self._tokenizer.decode(tail[::-1])
                if text and not text.startswith(_REPLACEMENT):
                    break
        return tail[::-1]

    def _texts_of_context(self) -> Seq[str]:
        context = self._context
        texts = [self._tokenizer.decode(context)]
        for count in range(len(context) - 1, max(-1, len(context) - 1 - _MOST_PENDING), -1):
            if not self._is_pending(context[: count + 1], texts[-1]):
                break
            texts.append(self._tokenizer.decode(context[:count]))
        return texts[0], texts[-1]

    def _is_pending(self, tokens: Seq[int], text: str) -> bool:
        """True if `text`, that of `tokens`, ends with a part of a character."""
        if not text.endswith(_REPLACEMENT) or self._num_pending >= _MOST_PENDING:
            return False
        endings = self._tokenizer.character_endings
        if not endings:
            return False
        decoded = (self._tokenizer.decode([*tokens, *ending]) for ending in endings)
        return any(not text.endswith(_REPLACEMENT) for text in decoded)


def _common(before: Seq[str], shown: str) -> tuple[str, int]:
    """The first of `before` that `shown` begins with, else the last, and how much is common."""
    for text in before:
        if shown.startswith(text):
            return text, len(text)
    last = before[-1]
    pairs = enumerate(zip(last, shown, strict=False))
    return last, next((i for i, (a, b) in pairs if a != b), min(len(last), len(shown)))
