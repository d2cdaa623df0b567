"""Requests of several samples: a sequence for each, and one completion for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from engine.requests.completion import Completion

__all__ = ["SampleGroups"]


class SampleGroups:
    """Which sequences are samples of one request, and those of them that have ended.

    A sample has a key of its own in the engine. A request whose sample fails has failed.
    """

    def __init__(self) -> None:
        self._ended: dict[str, dict[str, Completion | None]] = {}
        """By the request's key and the sample's, in the samples' order; None: not ended."""
        self._request_of: dict[str, str] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._ended

    def is_sample(self, key: str) -> bool:
        return key in self._request_of

    def open(self, key: str, num_samples: int) -> list[str]:
        """Expect so many samples of a request; returns their keys."""
        keys = [f"{key}\0{sample}" for sample in range(num_samples)]
        self._ended[key] = dict.fromkeys(keys)
        self._request_of.update(dict.fromkeys(keys, key))
        return keys

    def drop(self, key: str) -> list[str]:
        """Forget a request; returns the keys of its samples that hadn't ended."""
        samples = self._ended.pop(key, {})
        left = [sample for sample, completion in samples.items() if completion is None]
        for sample in left:
            self._request_of.pop(sample, None)
        return left

    def gather(self, ended: Iterable[Completion]) -> tuple[list[Completion], list[str]]:
        """Completions of whole requests, and keys of samples to cancel, since another one failed.

        Completions that aren't samples are returned as they are.
        """
        whole: list[Completion] = []
        to_cancel: list[str] = []
        for key, completion in [(self._request_of.pop(c.key, None), c) for c in ended]:
            if key is None:
                whole.append(completion)
            elif (samples := self._ended.get(key)) is not None:
                samples[completion.key] = completion
                done = [sample for sample in samples.values() if sample is not None]
                if completion.error is not None:
                    whole.append(replace(completion, key=key))
                    to_cancel += self.drop(key)
                elif len(done) == len(samples):
                    whole.append(_merged(key, done))
                    self.drop(key)
        return whole, to_cancel

    def clear(self) -> None:
        self._ended.clear()
        self._request_of.clear()


def _merged(key: str, samples: list[Completion]) -> Completion:
    """The first sample, with the times and counts of all."""
    return replace(
        samples[0],
        key=key,
        samples=samples,
        completion_tokens=sum(sample.completion_tokens for sample in samples),
        admitted_at=min((s.admitted_at for s in samples if s.admitted_at), default=None),
        first_token_at=min((s.first_token_at for s in samples if s.first_token_at), default=None),
        finished_at=max((s.finished_at for s in samples if s.finished_at), default=None),
        stage_s=[sum(shares) for shares in zip(*(s.stage_s for s in samples), strict=True)],
    )
