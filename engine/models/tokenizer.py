"""Text to tokens and back, and where a text ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine.models.chat import render_chat
from engine.models.checkpoint import Checkpoint
from engine.models.generation_config import ModelGeneration, end_of_text_ids
from queue_api.wire.errors import (
    InvalidRequestError,
    UnsupportedModelError,
    UnsupportedRequestError,
)
from queue_api.wire.schemas import GenerationRequest

__all__ = ["Tokenizer"]

logger = logging.getLogger(__name__)

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A checkpoint's tokenizer, chat template and end-of-text tokens."""

    def __init__(self, tokenizer: Any, eos_token_ids: frozenset[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        """The generation config's, else the config's, else the tokenizer's own."""
        self.vocab_size = vocab_size
        self._special_texts = _special_texts(tokenizer)
        self._is_text: dict[int, bool] = {}
        self._byte_alphabet = _byte_alphabet(tokenizer)
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: Any,
        generation: ModelGeneration,
        *,
        trust_remote_code: bool = False,
    ) -> Tokenizer:
        """Read the tokenizer's files.

        :raises UnsupportedModelError: if they can't be read, or end-of-text tokens aren't ids
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (ValueError, KeyError, OSError, ImportError) as error:
            raise UnsupportedModelError(f"{checkpoint.name}: tokenizer: {error}") from error
        text_config = config.get_text_config()
        sources = {
            generation.source: generation.config,
            "config.json": text_config,
            "tokenizer_config.json": tokenizer,
        }
        ids: frozenset[int] = frozenset()
        for source, holder in sources.items():
            if not ids:
                named = getattr(holder, "eos_token_id", None)
                ids = end_of_text_ids(named, str(checkpoint.folder / source))
        if not ids:
            logger.warning(
                "%s names no end-of-text token: texts end at max_tokens", checkpoint.name
            )
        _compare_ends(checkpoint.name, tokenizer, ids)
        return cls(tokenizer, ids, text_config.vocab_size)

    def encode(self, request: GenerationRequest) -> list[int]:
        """The prompt's token ids.

        Text gets the special tokens that the tokenizer adds (such as a BOS). A chat template
        writes its own, so templated text gets none besides.

        :raises InvalidRequestError: for what can't be tokenized, token ids out of the vocabulary,
            or messages that the model has no template for or whose template refuses them
        """
        if isinstance(request.prompt, list):
            tokens = request.prompt
        elif request.messages is not None:
            tokens = self._tokens(render_chat(self._tokenizer, request), add_special_tokens=False)
        else:
            tokens = self._tokens(request.prompt or "", add_special_tokens=True)
        if not tokens:
            raise InvalidRequestError("the prompt has no tokens")
        self.check_vocabulary(tokens, "'prompt'")
        return tokens

    def check_vocabulary(self, token_ids: Sequence[int], where: str) -> None:
        """See that the model knows these tokens.

        :param where: what they are, for the message
        :raises InvalidRequestError: naming the first that it doesn't know
        """
        if not token_ids or 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            return
        bad = next(token for token in token_ids if not 0 <= token < self.vocab_size)
        raise InvalidRequestError(
            f"token id {bad} in {where} is outside the vocabulary (0 to {self.vocab_size - 1})"
        )

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # such as half of a surrogate pair
            raise InvalidRequestError(f"{text!r:.40} can't be tokenized: {error}") from error
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def text_with_specials(self, token_ids: Sequence[int]) -> str:
        """All that `token_ids` say: what the model gets."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def is_text(self, token_id: int) -> bool:
        """False for special tokens and for ids that the tokenizer doesn't know."""
        if (known := self._is_text.get(token_id)) is None:
            known = (
                token_id not in self._special_texts
                and self._tokenizer.convert_ids_to_tokens(token_id) is not None
            )
            self._is_text[token_id] = known
        return known

    def special_text(self, token_id: int) -> str:
        """How a special token is written; empty for any other."""
        return self._special_texts.get(token_id, "")

    @property
    def has_bytes(self) -> bool:
        """Tokens are bytes, so that a text's are those of its tokens, one after the other."""
        return self._byte_alphabet is not None

    def token_bytes(self, token_id: int) -> bytes:
        """A token's bytes behind another, as transformers' `StopStringCriteria` has them."""
        if (known := self._token_bytes.get(token_id)) is None:
            assert self._byte_alphabet is not None
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            if token in self._byte_alphabet:
                known = bytes([self._byte_alphabet[token]])
            elif all(character in self._byte_alphabet for character in token):
                known = bytes(self._byte_alphabet[character] for character in token)
            else:
                front = self._tokenizer.encode("a", add_special_tokens=False)
                both = self._tokenizer.decode([*front, token_id])
                known = both.removeprefix(self._tokenizer.decode(front)).encode()
            self._token_bytes[token_id] = known
        return known

    def text_of(self, token_id: int) -> str:
        """The text of one token alone, special ones included."""
        text: str = self._tokenizer.decode([token_id])
        return text

    def encode_bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """The tokens of each word, at the beginning of a text and, as vLLM does, behind a space.

        The second only where the space becomes part of the word's first token.

        :raises InvalidRequestError: for a word that can't be tokenized
        """
        encoded = []
        for word in words:
            bare = word.lstrip() or word
            plain = self._tokens(bare, add_special_tokens=False)
            spaced = self._tokens(" " + bare, add_special_tokens=False)
            if not plain:
                raise InvalidRequestError(f"{word!r:.60} in 'bad_words' has no tokens")
            encoded.append(plain)
            if len(spaced) == len(plain) and spaced[0] != plain[0]:
                encoded.append(spaced)
        return encoded

    def for_grammars(self) -> Any:
        """The vocabulary as xgrammar has it: `xgrammar.TokenizerInfo`.

        :raises UnsupportedRequestError: if xgrammar can't read this kind of tokenizer
        """
        from xgrammar import TokenizerInfo

        try:
            return TokenizerInfo.from_huggingface(
                self._tokenizer,
                vocab_size=self.vocab_size,
                stop_token_ids=sorted(t for t in self.eos_token_ids if t < self.vocab_size),
            )
        except Exception as error:
            raise UnsupportedRequestError(
                f"'structured_outputs': xgrammar can't use this model's tokenizer: {error}"
            ) from error


def _compare_ends(name: str, tokenizer: Any, ids: frozenset[int]) -> None:
    """Warn of a model whose tokenizer ends texts otherwise than its generation config.

    Such as one that was trained on with another end-of-turn: its texts go on to max_tokens.
    """
    own = tokenizer.eos_token_id
    if not ids or own is None or own in ids:
        return
    ending = ", ".join(f"{tokenizer.decode([token])!r} ({token})" for token in sorted(ids))
    logger.warning(
        "%s: texts end with %s, as its config says, but the tokenizer's end-of-text is %r (%d); "
        "if texts go on for too long, give that as 'stop_token_ids', or name it in "
        "generation_config.json",
        *(name, ending, tokenizer.eos_token, own),
    )


def _special_texts(tokenizer: Any) -> dict[int, str]:
    """By id, the tokens that aren't in a decoded text.

    Asked of the tokenizer itself: its file may mark tokens that `all_special_ids` doesn't have.
    """
    texts = {}
    for token_id in sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}):
        text = tokenizer.decode([token_id])
        if text and not tokenizer.decode([token_id], skip_special_tokens=True):
            texts[token_id] = text
    return texts


def _byte_alphabet(tokenizer: Any) -> dict[str, int] | None:
    """What stands for each byte in the tokenizer's tokens; None if they hold characters alone."""
    byte_level = {character: byte for byte, character in bytes_to_unicode().items()}
    byte_fallback = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for alphabet in (byte_fallback, byte_level):
        names = [name for name, byte in alphabet.items() if byte in (0x80, 0xBF)]
        ids = tokenizer.convert_tokens_to_ids(names)
        if all(isinstance(i, int) and tokenizer.decode([i]) == _REPLACEMENT for i in ids):
            return alphabet
    return None
