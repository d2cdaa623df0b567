"""StopSearch: where the first of a request's stop strings stands in a text that grows."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from engine.models.tokenizer import Tokenizer
from engine.requests.detokenizer import TOKENS_PER_CHARACTER, Detokenizer

__all__ = ["FoundStop", "StopSearch"]


@dataclass(frozen=True, slots=True)
class FoundStop:
    """A stop string, and the new text in front of it."""

    before: str
    string: str
    """As much of it as is in the new text: all, unless it may begin in the prompt."""


class StopSearch:
    """Follows one text and looks for stop strings in what each token adds.

    A stop string counts that stands in the text, or in the text with special tokens written out,
    as `transformers.generate` looks for its `stop_strings`. A part of a character isn't text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Seq[int],
        stop: Seq[str],
        min_tokens: int,
        *,
        may_begin_in_prompt: bool = False,
    ) -> None:
        """
        :param min_tokens: what ends within so many tokens doesn't count
        :param may_begin_in_prompt: a stop string counts that only ends in the new text, as in
            `generate`; else all of it has to be there, as in vLLM and with OpenAI's servers
        """
        self._tokenizer = tokenizer
        self._whole = Detokenizer(tokenizer, prompt)
        self._stop = stop
        self._min_tokens = min_tokens
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        longest = max(map(len, stop))
        self._plain = _Tail(longest)
        """The text's end, without special tokens."""
        self._written = _Tail(longest)
        """The same with them."""
        num_read = min(len(prompt), longest * TOKENS_PER_CHARACTER) if may_begin_in_prompt else 0
        begin = len(prompt) - num_read
        self._detokenizer = Detokenizer(tokenizer, prompt[:begin]) if num_read else self._whole
        self._read_prompt(prompt[begin:])

    @property
    def num_read(self) -> int:
        """Tokens taken in."""
        return len(self._tokens)

    def read(self, tokens: Seq[int]) -> FoundStop | None:
        """Take in the next tokens; what is found, where the text begins with it soonest."""
        for token in tokens:
            self._tokens.append(token)
            drop, added, special = self._take_in(token)
            self._change(drop, added)
            if self.num_read <= self._min_tokens:
                self._plain.pass_over()
                self._written.pass_over()
            elif (added or special) and (found := self._find()) is not None:
                return found
        return None

    def _read_prompt(self, end: Seq[int]) -> None:
        for token in end:
            if self._take_in(token)[2]:
                self._plain.clear()  # transformers finds nothing across special tokens
        self._plain.end_prompt()
        self._written.end_prompt()

    def _take_in(self, token: int) -> tuple[int, str, str]:
        """How a token changes the text, as `Detokenizer.add` says it, and how it is written."""
        special = self._tokenizer.special_text(token)
        drop, added = self._detokenizer.add(token)
        for tail in (self._plain, self._written):
            tail.change(drop, added)
        self._written.append(special, is_special=True)
        return drop, added, special

    def _change(self, drop: int, added: str) -> None:
        while drop and self._pieces:
            last = self._pieces.pop()
            if len(last) > drop:
                self._pieces.append(last[:-drop])
            drop = max(0, drop - len(last))
        self._pieces.append(added)

    def _find(self) -> FoundStop | None:
        tails = [self._plain]
        if self._written.has_special:
            tails.append(self._written)
        places = [
            (*place, string)
            for tail in tails
            for string in self._stop
            if (place := tail.find(string)) is not None
        ]
        if not places:
            return None
        back, _, in_prompt, string = max(places, key=lambda place: place[:2])
        return FoundStop(self._text_before(back), string[in_prompt:])

    def _text_before(self, back: int) -> str:
        """The text without its last characters, as it is shown."""
        text = "".join(self._pieces)
        begin = max(0, len(text) - back)
        before, rest = text[:begin], text[begin:]
        shown = self._whole.text(self._tokens)
        # not so if the tokenizer dropped the blank that a stop string begins with
        return shown[: len(shown) - len(rest)] if shown.endswith(rest) else before


class _Tail:
    """The end of a text: as much as a stop string may begin in, and what has come since."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._text = ""
        self._is_special = bytearray()  # by character
        self._num_new = 0
        """Characters at the end that the last token brought."""
        self._num_allowed = 0
        """Characters at the end in which a stop string may end."""
        self._num_prompt = 0
        """Characters at the beginning that are the prompt's."""

    @property
    def has_special(self) -> bool:
        return 1 in self._is_special

    def change(self, drop: int, added: str) -> None:
        """Take the text's last `drop` characters off, special tokens excepted, and add some."""
        old = max(0, len(self._text) - self._longest)
        self._text, self._is_special = self._text[old:], self._is_special[old:]
        self._num_prompt = max(0, self._num_prompt - old)
        self._num_new = 0
        place = len(self._text)
        while drop and place:
            place -= 1
            if not self._is_special[place]:
                self._num_allowed -= len(self._text) - place <= self._num_allowed
                self._text = self._text[:place] + self._text[place + 1 :]
                del self._is_special[place]
                drop -= 1
        self._num_prompt = min(self._num_prompt, len(self._text))
        self.append(added)

    def append(self, text: str, *, is_special: bool = False) -> None:
        self._text += text
        self._is_special += bytes([is_special]) * len(text)
        self._num_new += len(text)
        self._num_allowed += len(text)

    def pass_over(self) -> None:
        """Nothing that ends in what there is now counts."""
        self._num_allowed = 0

    def end_prompt(self) -> None:
        """What there is now is the prompt's: a stop string may begin there, but not end."""
        self.pass_over()
        self._num_prompt = len(self._text)

    def clear(self) -> None:
        """No stop string may begin in what there is now."""
        self.pass_over()
        self._text, self._is_special, self._num_new = "", bytearray(), 0

    def find(self, string: str) -> tuple[int, int, int] | None:
        """How far the first `string` that ends in what is new begins and ends before the end.

        :returns: characters of the text, special tokens not counted, and how many of the string
            are the prompt's; None if it isn't there
        """
        first_end = len(self._text) - min(self._num_new, self._num_allowed) + 1
        begin = self._text.find(string, max(0, first_end - len(string)))
        if begin < 0:
            return None
        end = begin + len(string)
        special = self._is_special
        in_prompt = max(0, self._num_prompt - begin)
        return special[begin:].count(0), special[end:].count(0), in_prompt
