"""Detokenizer: the text of new tokens as it stands behind their prompt, whole or as it grows.

A token's text depends on its neighbours: tokenizers like Llama 2's drop the blank of the first
token that they decode, and a character may lie in several tokens. So new tokens are decoded
behind the prompt's last ones, and what these give alone is taken off (as in vLLM's
`detokenize_incrementally`). While a text grows a token costs the same in any text: where tokens
are bytes those are read on, else a window of the last tokens is decoded.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from engine.models.tokenizer import Tokenizer

__all__ = ["TOKENS_PER_CHARACTER", "Detokenizer"]

_OVERLAP = 8
"""Tokens with text that a window keeps."""
TOKENS_PER_CHARACTER = 4
"""At most."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The new tokens of one sequence as text: `text` at once, `add` one by one."""

    def __init__(self, tokenizer: Tokenizer, prompt: Seq[int]) -> None:
        self._tokenizer = tokenizer
        self._context = self._tail(prompt)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(self._part(self._context))
        self._before = self._texts_of_context()
        self._window = list(self._context)
        self._shown = self._before[0]

    def text(self, new: Iterable[int]) -> str:
        """What `new` adds to the prompt's text, without special tokens."""
        whole = self._tokenizer.decode([*self._context, *filter(self._tokenizer.is_text, new)])
        for before in self._before:
            if whole.startswith(before):
                return whole[len(before) :]
        return whole[_common(self._before[-1], whole) :]

    def add(self, token: int) -> tuple[int, str]:
        """Take in the next new token; how it changes the text.

        :returns: how many characters go from the text's end, seldom any, and those that come: a
            character comes when all of its bytes are there
        """
        if not self._tokenizer.is_text(token):
            return 0, ""
        if self._tokenizer.has_bytes:
            return 0, self._decoder.decode(self._tokenizer.token_bytes(token))
        self._window.append(token)
        before, shown = self._shown, self._tokenizer.decode(self._window)
        kept = _common(before, shown)
        if len(self._window) < 2 * _OVERLAP:
            self._shown = shown
        else:
            self._window = self._window[-_OVERLAP:]
            self._shown = self._tokenizer.decode(self._window)
        return len(before) - kept, shown[kept:]

    def _tail(self, prompt: Seq[int]) -> list[int]:
        """The prompt's last tokens, at least so many that they have text."""
        tail: list[int] = []
        for token in reversed(prompt):
            if not self._tokenizer.is_text(token):
                continue
            tail.append(token)
            count = len(tail)
            # looked at seldom: at 8, 16, 32, …
            if count >= _OVERLAP and count & (count - 1) == 0:
                text = self._tokenizer.decode(tail[::-1])
                if text and not text.startswith(_REPLACEMENT):
                    break
        return tail[::-1]

    def _part(self, tokens: Seq[int]) -> bytes:
        """The bytes that tokens end with of a character that lacks its own end."""
        if not self._tokenizer.has_bytes:
            return b""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(b"".join(map(self._tokenizer.token_bytes, tokens[-TOKENS_PER_CHARACTER:])))
        return decoder.getstate()[0]

    def _texts_of_context(self) -> Seq[str]:
        """The prompt's end as text, and without that part, the longest first."""
        context = self._context
        shown = self._tokenizer.decode(context)
        if not self._part(context):
            return [shown]
        count = len(context)
        while count and self._part(context[:count]):
            count -= 1
        # bytes that follow others may be read as a whole, so both aren't always the same
        without = {shown.rstrip(_REPLACEMENT), self._tokenizer.decode(context[:count])}
        return sorted({shown, *without}, key=len, reverse=True)


def _common(before: str, after: str) -> int:
    """With how many characters both begin."""
    if after.startswith(before):
        return len(before)
    pairs = enumerate(zip(before, after, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
