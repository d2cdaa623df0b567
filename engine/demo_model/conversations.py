"""Turns questions into token rows: chat or bare, one question or several, loss on answers only."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from engine.demo_model.corpus import STORIES, Question, draw_question, training_questions
from engine.demo_model.vocabulary import ASSISTANT, BOS, EOS, SYSTEM, USER

IGNORED = -100  # the target of a token that carries no loss
RAW_SHARE = 0.45
SYSTEM_SHARE = 0.3
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer briefly.", "You are a small toy model.")


@dataclass(frozen=True)
class Row:
    """Token ids of a conversation and, at each place, the token to predict next or `IGNORED`."""

    tokens: list[int]
    targets: list[int]


class RowMaker:
    """Draws training rows. Everything random comes from the one generator it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: Random) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        self._special_ids = [
            tokenizer.vocab[token] for token in (BOS, EOS, SYSTEM, USER, ASSISTANT)
        ]
        self._questions = training_questions(rng)

    def micro_batches(self, questions: int, stories: int, dialogues: int) -> list[list[Row]]:
        """The rows of one training step, apart by length so that little of a batch is padding."""
        short = [self._row([next(self._questions)]) for _ in range(questions)]
        short.sort(key=lambda row: len(row.tokens))
        half = -(-questions // 2)
        told = [draw_question(STORIES, self._rng, held_out=False) for _ in range(stories)]
        long = [self._row([story]) for story in told]
        lengths = [self._rng.randint(2, 5) for _ in range(dialogues)]
        long += [self._row([next(self._questions) for _ in range(num)]) for num in lengths]
        return [*(short[start : start + half] for start in range(0, questions, half)), long]

    def _row(self, questions: list[Question]) -> Row:
        pieces = list(self._pieces(questions))
        tokens = [token for ids, _ in pieces for token in ids]
        learned = [is_answer for ids, is_answer in pieces for _ in ids]
        targets = [
            token if is_answer else IGNORED
            for token, is_answer in zip(tokens[1:], learned[1:], strict=True)
        ]
        return Row(tokens[:-1], targets)

    def _pieces(self, questions: list[Question]) -> Iterator[tuple[list[int], bool]]:
        """Token runs of a conversation, each with whether the toy learns to say it."""
        bos, eos, system, user, assistant = self._special_ids
        yield [bos], False
        if len(questions) == 1 and self._rng.random() < RAW_SHARE:
            newline = "\n" if self._rng.random() < 0.3 else ""
            yield self._encode(questions[0].prompt + newline), False
            yield [*self._encode(questions[0].answer), eos], True
            return
        if len(questions) > 1 and self._rng.random() < SYSTEM_SHARE:
            message = self._rng.choice(SYSTEM_MESSAGES)
            yield [system, *self._encode(message)], False
        for question in questions:
            prompt = self._encode(question.prompt)
            yield [user, *prompt, assistant], False
            yield [*self._encode(question.answer), eos], True

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def to_batch(rows: list[Row], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded tokens and targets, both int64 [B, T]; causal attention never sees padding."""
    longest = max(len(row.tokens) for row in rows)
    tokens = [row.tokens + [pad_id] * (longest - len(row.tokens)) for row in rows]
    targets = [row.targets + [IGNORED] * (longest - len(row.targets)) for row in rows]
    return torch.tensor(tokens), torch.tensor(targets)
