"""What a model's generation config asks for, as defaults of requests that don't say otherwise.

The processors are transformers' own, in the order of its `generate`, so that greedy text is that
of `generate(do_sample=False)`; each works on a text's tokens alone, so it is the same in every
batch, partition and resumption.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import logits_process as hf

from engine.models.generation_config import ModelGeneration
from queue_api.wire.errors import UnsupportedModelError, UnsupportedRequestError
from queue_api.wire.sampling import GenerationDefaults, SamplingParams

__all__ = [
    "APPLIED_FIELDS",
    "SAMPLING_FIELDS",
    "UNSUPPORTED_FIELDS",
    "AppliedDefaults",
    "ModelDefaults",
    "Processor",
]

logger = logging.getLogger(__name__)

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Token ids [1, L] and scores [1, V] to scores [1, V]."""

_OWN_FIELD = {
    "repetition_penalty": "repetition_penalty",
    "bad_words_ids": "bad_words",
    "min_length": "min_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
}
"""The request's field that goes before the model's."""
_OF_ENDINGS = frozenset(
    {"min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id"}
)
"""Left out beside structured outputs, which say how a text begins and ends."""
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p")
"""Applied where all of a model's defaults are asked for."""
_SAMPLING_UNSUPPORTED = ("typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
_UNSUPPORTED: Mapping[str, Collection[object]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1, 1.0),
    "diversity_penalty": (0, 0.0),
    "penalty_alpha": (0, 0.0),
    "token_healing": (False,),
    "watermarking_config": (),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "max_time": (),
}
"""What would make another text, and the values with which it doesn't."""
UNSUPPORTED_FIELDS = (*_UNSUPPORTED, *_SAMPLING_UNSUPPORTED)
"""Named in a warning; the latter where all of a model's defaults are asked for."""


@dataclass(frozen=True)
class _Text:
    """What a processor is built for."""

    prompt: Seq[int]
    max_tokens: int
    eos: torch.Tensor  # [number of end-of-text ids], on the logits' device

    def prompt_ids(self) -> Any:
        return torch.tensor([list(self.prompt)], device=self.eos.device)  # [1, prompt tokens]

    def begin_index(self, forced_bos: object) -> int:
        size = len(self.prompt)
        return size if size > 1 or forced_bos is None else size + 1


_Build = Callable[[Any, _Text], Processor]
_BUILDERS: dict[str, _Build] = {
    "sequence_bias": lambda value, _: hf.SequenceBiasLogitsProcessor(value),
    "encoder_repetition_penalty": lambda value, text: hf.EncoderRepetitionPenaltyLogitsProcessor(
        value, text.prompt_ids()
    ),
    "repetition_penalty": lambda value, _: hf.RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, _: hf.NoRepeatNGramLogitsProcessor(value),
    "encoder_no_repeat_ngram_size": lambda value, text: hf.EncoderNoRepeatNGramLogitsProcessor(
        value, text.prompt_ids()
    ),
    "bad_words_ids": lambda value, text: hf.NoBadWordsLogitsProcessor(value, text.eos),
    "min_length": lambda value, text: hf.MinLengthLogitsProcessor(value, text.eos),
    "min_new_tokens": lambda value, text: hf.MinNewTokensLengthLogitsProcessor(
        len(text.prompt), value, text.eos
    ),
    "forced_bos_token_id": lambda value, _: hf.ForcedBOSTokenLogitsProcessor(value),
    "forced_eos_token_id": lambda value, text: hf.ForcedEOSTokenLogitsProcessor(
        len(text.prompt) + text.max_tokens, value
    ),
    "remove_invalid_values": lambda _, __: hf.InfNanRemoveLogitsProcessor(),
    "exponential_decay_length_penalty": lambda value, text: hf.ExponentialDecayLengthPenalty(
        value, text.eos, len(text.prompt)
    ),
    "suppress_tokens": lambda value, _: hf.SuppressTokensLogitsProcessor(value),
    "begin_suppress_tokens": lambda value, text: hf.SuppressTokensAtBeginLogitsProcessor(
        value[1], text.begin_index(value[0])
    ),
    "renormalize_logits": lambda _, __: hf.LogitNormalization(),
}
"""In the order of transformers' `_get_logits_processor`."""
APPLIED_FIELDS = (*_BUILDERS, "stop_strings")
_SAME_FOR_ALL = frozenset({"sequence_bias", "bad_words_ids", "suppress_tokens"})
"""Built once: they take time, and know nothing of a text."""
_NO_EFFECT: Mapping[str, object] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
}


@dataclass(frozen=True, slots=True)
class AppliedDefaults:
    """What a request's text is made with."""

    sampling: SamplingParams
    """The request's, with the model's values where it gives none."""
    names: tuple[str, ...] = ()
    """The fields of the generation config that have a part in it."""
    processors: tuple[Processor, ...] = ()
    """Applied in this order; a repetition penalty is among them then, and not in `sampling`."""


class ModelDefaults:
    """The defaults of one model. Which of them a request gets is said by `generation_defaults`.

    `model`: what `generate(do_sample=False)` applies. `all`: the sampling fields that its file
    names, too. `none`: nothing.
    """

    def __init__(
        self,
        generation: ModelGeneration,
        *,
        eos_token_ids: Collection[int],
        vocab_size: int,
        mode: GenerationDefaults = "model",
        device: torch.device | str = "cpu",
    ) -> None:
        """Say in the log what is applied, and what can't be.

        :param device: the logits'
        :raises UnsupportedModelError: a field that can't be applied, if `mode` asks for it
        """
        self.mode = mode
        eos = sorted(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._eos = torch.tensor(eos, dtype=torch.long, device=device)
        self._shared: dict[str, Processor] = {}
        named = generation.named()
        self._processed = {
            name: named[name]
            for name in _BUILDERS
            if name in named and named[name] != _NO_EFFECT.get(name)
        }
        if not eos:
            for name in ("min_length", "min_new_tokens", "exponential_decay_length_penalty"):
                self._processed.pop(name, None)
        if "min_new_tokens" in self._processed:
            self._processed.pop("min_length", None)
        if "begin_suppress_tokens" in self._processed:
            pair = (named.get("forced_bos_token_id"), named["begin_suppress_tokens"])
            self._processed["begin_suppress_tokens"] = pair
        stop = named.get("stop_strings") or []
        self._stop = list(stop) if isinstance(stop, list | tuple) else [stop]
        self._sampling = {name: named[name] for name in SAMPLING_FIELDS if name in named}
        self._sampling.setdefault("temperature", 1.0)
        if not named.get("do_sample"):
            self._sampling = {}
        self._problem = self._try(generation.source, vocab_size)
        if mode != "none":
            if self._problem is not None:
                raise UnsupportedModelError(
                    f"{self._problem}; generation_defaults=none leaves all such fields out"
                )
            self._tell(generation.source, named)

    def _try(self, source: str, vocab_size: int) -> str | None:
        """Apply everything once, for a value may be of any kind; what is wrong, if anything is."""
        scores = torch.zeros(1, vocab_size, device=self._eos.device)
        ids = torch.zeros(1, 2, dtype=torch.long, device=self._eos.device)
        for name, value in self._processed.items():
            try:
                _BUILDERS[name](value, _Text([0, 0], 8, self._eos))(ids, scores)
                _BUILDERS[name](value, _Text([0], 1, self._eos))(ids[:, :1], scores)
            except Exception as error:
                shown = value[1] if name == "begin_suppress_tokens" else value
                return f"{source}: '{name}' is {shown!r:.60}: {' '.join(str(error).split()):.200}"
        if not all(isinstance(string, str) and string for string in self._stop):
            return f"{source}: 'stop_strings' is {self._stop!r:.60}; it must be a list of texts"
        return None

    def _tell(self, source: str, named: Mapping[str, Any]) -> None:
        """Say once what counts and what doesn't."""
        applied = [*self._processed, *(["stop_strings"] if self._stop else [])]
        if applied:
            logger.info(
                "%s: applied where a request says nothing else: %s", source, _shown(applied, named)
            )
        if self._sampling and self.mode == "model":
            logger.info(
                "%s: %s aren't applied: texts are greedy unless a request says otherwise, "
                "or generation_defaults=all",
                *(source, _shown(self._sampling, named)),
            )
        left = [n for n, neutral in _UNSUPPORTED.items() if n in named and named[n] not in neutral]
        if self._sampling and self.mode == "all":
            left += [name for name in _SAMPLING_UNSUPPORTED if name in named]
        if left:
            logger.warning(
                "%s: %s can't be applied here: texts are made without", source, _shown(left, named)
            )

    def applied(self, sampling: SamplingParams, prompt: Seq[int]) -> AppliedDefaults:
        """What becomes of a request's sampling fields.

        :raises UnsupportedRequestError: it asks for defaults that can't be applied
        """
        mode = sampling.generation_defaults or self.mode
        if mode == "none":
            return AppliedDefaults(sampling)
        if self._problem is not None:
            raise UnsupportedRequestError(f"'generation_defaults' is {mode!r}: {self._problem}")
        given = sampling.model_fields_set
        update: dict[str, object] = {}
        names: list[str] = []
        if self._stop and "stop" not in given:
            update["stop"] = self._stop
            names.append("stop_strings")
        if mode == "all":
            chosen = {n: v for n, v in self._sampling.items() if n not in given}
            update |= chosen
            names += chosen
        values = {
            name: value
            for name, value in self._processed.items()
            if _OWN_FIELD.get(name) not in given
            and not (sampling.structured_outputs is not None and name in _OF_ENDINGS)
        }
        names = [*values, *names]
        if values and sampling.repetition_penalty != 1.0:
            values["repetition_penalty"] = float(sampling.repetition_penalty)
            update["repetition_penalty"] = 1.0  # in its place among the others
        text = _Text(prompt, sampling.max_tokens, self._eos)
        processors = tuple(
            self._build(name, values[name], text) for name in _BUILDERS if name in values
        )
        if update:
            sampling = sampling.model_copy(update=update)
        return AppliedDefaults(sampling, tuple(names), processors)

    def _build(self, name: str, value: object, text: _Text) -> Processor:
        if name not in _SAME_FOR_ALL:
            return _BUILDERS[name](value, text)
        if name not in self._shared:
            self._shared[name] = _BUILDERS[name](value, text)
        return self._shared[name]


def _shown(names: Collection[str], named: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={named.get(name, 1.0)!r:.40}" for name in names)
