"""Which architectures the engine runs, and that none of them is silently wrong.

For every causal-LM architecture of the installed transformers, and every kind of rotary positions
that its config takes: build a small random model, write texts greedily in float32 with several even
and uneven cuts, and compare them with `transformers.generate` token for token, and the logits of a
prompt computed in chunks with the model's own forward. Prompts are up to three times as long as
what is computed at once; texts begin before each length that the config names (windows, chunks,
original positions), at it and behind it, and grow past it; there are too few slots for all, so that
some are preempted; and all are written a second time, resumed from a part of themselves. A few
architectures are then written with each field of generation_config.json that the engine knows
(`llama@repetition_penalty`), beside `generate` with the same file. Each one
runs in a process of its own with a time limit; results are kept as JSON, so that a sweep that was
stopped goes on where it was. At the end the table in docs/support.md is written.

    python benchmarks/support_table.py [--only NAME ...] [--again]

With `--quantization int8` the engine's text is compared with that of a model whose layers' weights
are quantized by PyTorch; its results are kept apart and no table is written.
"""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import itertools
import json
import logging
import multiprocessing
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from generation_fields import (
    ALL_FIELDS,
    NO_EFFECT,
    change_generation_config,
    is_applied,
    values_for,
)
from generation_fields import ARCHITECTURES as FIELD_ARCHITECTURES
from small_models import (
    ARCHITECTURES,
    NUM_LAYERS,
    ROPE_KINDS,
    VOCAB,
    has_rope,
    save_small_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from engine.batch import ForwardBatch, Segment
from engine.config import EngineConfig, Quantization
from engine.engine import Engine
from engine.models.long_rope import rope_entries
from engine.models.slicing import find_layers
from engine.sampling import model_defaults
from queue_api.wire.errors import ConfigurationError
from queue_api.wire.schemas import GenerationRequest, SamplingParams

RESULTS = Path(__file__).parent / "results" / "support.json"
TABLE = Path(__file__).parents[1] / "docs" / "support.md"
CUTS: dict[str, tuple[int, ...]] = {
    "1": (),
    "2": (3,),
    "4": (2, 4, 5),
    "1+5": (1,),
    "2+3+1": (2, 5),
}
"""How an architecture of six layers is cut; of another number, the uneven cuts are left out."""
FEW_CUTS = ("1", "1+5")
"""Those that each rotary kind is tried with, for how positions are rotated, each stage knows alone,
and each field of a generation config, for it has to do with the last stage alone."""
NEW_TOKENS = 24
MAX_LEN = 96
LONGEST = 72
"""Tokens of the longest prompt, three times what is computed at once."""
CACHE_SLOTS = 3 * MAX_LEN
CHUNKS = (13, 1, 1, 9, 1, 5, 14, 1)
LOGIT_TOLERANCE = 1e-3
"""Of the logits' relative error. Wrong masks and positions make errors of 0.01 and more."""
TIE = 1e-4
"""Two logits nearer than this, relative to their spread over the vocabulary, are a tie."""


@dataclass
class Result:
    """What became of one architecture."""

    name: str
    status: str = "unbuildable"
    """packed, single, mixed, refused, unbuildable, wrong, or error: not refused, but failed. Of a
    generation config's field also warned: a warning names it, and texts are made without."""
    reason: str = ""
    modes: dict[str, str] = field(default_factory=dict)
    """Cut to how each stage runs."""
    boundaries: list[int] = field(default_factory=list)
    """Lengths that the config names, which texts were led across."""
    preemptions: int = 0
    """Over all partitions."""
    ties: int = 0
    """Texts that left `generate`'s at a near tie."""
    recomputed_otherwise: int = 0
    """Texts that `generate`, too, ends otherwise when given a part of them."""
    logit_error: float = 0.0
    """The largest relative error of the logits over all partitions."""
    distinct_tokens: int = 0
    """Different tokens in the reference's texts: few of them would prove little."""
    sensitivity: float = 0.0
    """How much the last logits change if two earlier tokens change places."""
    changed: int = 0
    """Texts of the reference that a field of its generation config changes."""
    seconds: float = 0.0


# --------------------------------------------------------------------------------- one of them


_BOUNDARY_WORDS = ("window", "chunk", "original_max", "local_attention", "block", "topk", "scale")


def boundaries(config: Any) -> list[int]:
    """Lengths at which a text of this model may begin to be treated otherwise."""
    text = config.get_text_config()
    named = [*vars(text).items(), *(pair for e in rope_entries(text) for pair in e.items())]
    return sorted(
        {
            value
            for name, value in named
            if type(value) is int and any(word in name for word in _BOUNDARY_WORDS)
            if 4 < value <= LONGEST - NEW_TOKENS
        }
    )


def mixed_prompts(lengths_to_cross: list[int]) -> list[list[int]]:
    """Prompts of 1 to LONGEST random tokens, from a fixed seed, some around the given lengths."""
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 2, 3, 36, LONGEST, *torch.randint(4, 60, (9,), generator=generator).tolist()]
    for length in lengths_to_cross:
        lengths += [length - 4, length - 1, length, length + 1]
    return [torch.randint(8, VOCAB, (n,), generator=generator).tolist() for n in lengths]


class Reference:
    """transformers' own model and its texts."""

    def __init__(
        self,
        folder: Path,
        prompts: list[list[int]],
        quantization: Quantization = "none",
        *,
        field: str = "",
    ) -> None:
        """:param field: of its generation config, which changes its texts"""
        self.folder, self.prompts, self.quantization = folder, prompts, quantization
        self.field, self.tokenizer = field, AutoTokenizer.from_pretrained(folder)
        text = (folder / "config.json").read_text()
        # transformers before 5.23 leaves soft-capping out of its default attention.
        kwargs = {"attn_implementation": "eager"} if "attn_logit_softcapping" in text else {}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)
        self.model.eval()
        if quantization == "int8":
            for layer in getattr(*find_layers(self.model)):
                _round(layer)
        self.texts = [self._greedy(prompt) for prompt in prompts]

    def continued(self, prompt: list[int], part: list[int]) -> list[int]:
        """`part` and what `generate` makes of prompt and part."""
        return (part + self._greedy(prompt + part))[:NEW_TOKENS]

    def can_end_so(self, prompt: list[int], text: list[int]) -> bool:
        """True if each token of the text is what the model itself has behind those before: when it
        computes prompt and text at once up to there, as `generate` does, or in two parts."""
        known = 0
        while (rest := self.continued(prompt, text[:known])) != text:
            if len(rest) != len(text):
                return False
            place = next(i for i, (a, b) in enumerate(zip(text, rest, strict=True)) if a != b)
            if text[place] not in self._next_in_two_parts(prompt, text[:place]):
                return False
            known = place + 1
        return True

    @torch.inference_mode()
    def _next_in_two_parts(self, prompt: list[int], text: list[int]) -> set[int]:
        """What the model has behind the text if the first part is computed at once, then the rest
        of the prompt, then token by token; for each first part."""
        ids, found = torch.tensor([prompt + text]), set[int]()
        for cut in range(1, ids.shape[1]):
            out = self.model(ids[:, :cut], use_cache=True)
            places = [cut, *range(max(cut + 1, len(prompt)), ids.shape[1] + 1)]
            for start, end in itertools.pairwise(places):
                out = self.model(
                    ids[:, start:end], past_key_values=out.past_key_values, use_cache=True
                )
            found.add(int(out.logits[0, -1].argmax()))
        return found

    def _greedy(self, prompt: list[int]) -> list[int]:
        tokens: list[int] = self._generate(prompt).sequences[0, len(prompt) :].tolist()
        return tokens

    @torch.inference_mode()
    def _generate(self, prompt: list[int], **kwargs: Any) -> Any:
        ids = torch.tensor([prompt])
        return self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            tokenizer=self.tokenizer,  # finds stop strings
            **kwargs,
        )

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), V], from one forward without a cache, called as `generate` does."""
        ids = torch.tensor([tokens])
        kwargs = {"use_cache": False, "attention_mask": torch.ones_like(ids)}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            kwargs["position_ids"] = torch.arange(len(tokens))[None]
        logits: torch.Tensor = self.model(ids, **kwargs).logits[0]
        return logits

    @torch.inference_mode()
    def logits_in_chunks(self, tokens: list[int]) -> torch.Tensor:
        """[len(CHUNKS), V], behind each of CHUNKS, computed one after the other with a cache."""
        outputs, past, cache = [], 0, None
        for count in CHUNKS:
            ids = torch.tensor([tokens[past : past + count]])
            output = self.model(ids, past_key_values=cache, use_cache=True)
            outputs.append(output.logits[0, -1])
            past, cache = past + count, output.past_key_values
        return torch.stack(outputs)

    def exact_logits(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), V], in double precision."""
        single, self.model = self.model, copy.deepcopy(self.model).double()
        try:
            return self.logits(tokens)
        finally:
            self.model = single

    def is_tie(self, prompt: list[int], text: list[int], one: int, other: int) -> bool:
        """True if both tokens are equally good behind `text`, up to rounding."""
        if self.field:  # and what it makes of the scores
            last = self._generate(prompt, output_scores=True).scores[len(text)][0]
        else:
            last = self.logits(prompt + text)[-1]
        spread = last[last.isfinite()]
        return bool((last[one] - last[other]).abs() <= TIE * (spread.max() - spread.min()))


def _round(layer: torch.nn.Module) -> None:
    linears = {m for m in layer.modules() if type(m) is torch.nn.Linear and m.weight.numel()}
    for linear in linears:
        weight = linear.weight.detach()
        scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30)
        linear.weight = torch.nn.Parameter((weight / scales[:, None]).round() * scales[:, None])


def engine_logits(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """The engine's logits after each of CHUNKS, run through its stages by hand."""
    outputs, past = [], 0
    rope = engine.stages[0].long_rope
    is_long = rope is not None and rope.is_long(len(tokens), len(tokens))
    for count in CHUNKS:
        batch = ForwardBatch(
            segments=[Segment(0, count, past, 3, 10_000, is_long)],
            token_ids=torch.tensor(tokens[past : past + count]),
            positions=torch.arange(past, past + count),
            slots=torch.arange(3 + past, 3 + past + count),
            logit_rows=torch.tensor([count - 1]),
        )
        passed = batch.token_ids[None]
        for stage in engine.stages:
            passed = stage.run(batch, passed)
        outputs.append(passed.clone())
        past += count
    return torch.cat(outputs)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def logit_error(engine: Engine, reference: Reference) -> float:
    """How far the engine's logits of chunks are from the model's.

    Some models compute a text at once in another order than in parts, and round more than the
    tolerance allows (Qwen3.5); then what counts is the model's own computing in parts, or that
    the engine isn't farther from the model in double precision than transformers is.
    """
    probe = max(reference.prompts, key=len)[: sum(CHUNKS)]
    ends = torch.tensor(CHUNKS).cumsum(0) - 1
    found = engine_logits(engine, probe)
    error = relative_error(found, reference.logits(probe)[ends])
    if not error <= LOGIT_TOLERANCE:
        try:
            error = min(error, relative_error(found, reference.logits_in_chunks(probe)))
        except Exception:  # it keeps no cache, or one that can't be given so
            return error
    if not error <= LOGIT_TOLERANCE:
        exact = reference.exact_logits(probe)[ends]
        own = relative_error(reference.logits(probe)[ends].double(), exact)
        if (ours := relative_error(found.double(), exact)) <= own:
            return min(ours, LOGIT_TOLERANCE)
    return error


def load(reference: Reference, cut: str) -> Engine:
    """One partition, with fewer slots than the texts need.

    :raises ConfigurationError: if the engine refuses the model
    """
    is_left_out = bool(reference.field) and not is_applied(reference.field)
    return Engine.load(
        EngineConfig(
            str(reference.folder),
            dtype="float32",
            quantization=reference.quantization,
            devices=("cpu",) * (len(CUTS[cut]) + 1),
            partition="custom" if CUTS[cut] else "uniform",
            layer_bounds=CUTS[cut] or None,
            max_num_seqs=16,
            max_batch_tokens=24,  # below the longest prompts: they are computed among decodes
            max_model_len=MAX_LEN,
            kv_cache_tokens=CACHE_SLOTS,
            generation_defaults="all" if is_left_out else "model",
        )
    )


def compare(reference: Reference, cut: str, result: Result) -> str:
    """Run one partition; what is wrong with it, or nothing.

    :raises ConfigurationError: if the engine refuses the model
    """
    engine = load(reference, cut)
    result.modes[cut] = "/".join(stage.mode for stage in engine.stages)
    none = [0] * len(reference.texts)
    wrong = count_wrong(reference, write(engine, reference, none), result, none)
    parts = [int((1 / 3, 1 / 2, 1)[i % 3] * (len(t) - 1)) for i, t in enumerate(reference.texts)]
    again = count_wrong(reference, write(engine, reference, parts), result, parts)
    result.preemptions += engine.metrics.preemptions
    error = 0.0 if reference.field else logit_error(engine, reference)
    result.logit_error = max(result.logit_error, error)
    engine.close()
    problems = []
    if wrong:
        problems.append(f"{wrong} of {len(reference.prompts)} texts differ")
    if again:
        problems.append(f"{again} of {len(reference.prompts)} resumed texts differ")
    if not error <= LOGIT_TOLERANCE:
        problems.append(f"logits are off by {error:.1e}")
    return f"{cut} stages: {', '.join(problems)}" if problems else ""


def write(engine: Engine, reference: Reference, parts: list[int]) -> list[list[int]]:
    """The engine's texts, each resumed from so many of the reference's tokens."""
    # a temperature that is given goes before the model's
    greedy = {} if is_applied(reference.field) else {"temperature": 0.0}
    params = SamplingParams(max_tokens=NEW_TOKENS, **greedy)
    found: dict[str, list[int]] = {}
    for i, (prompt, text) in enumerate(zip(reference.prompts, reference.texts, strict=True)):
        request = GenerationRequest(id=str(i), prompt=prompt, sampling=params)
        engine.add(str(i), request, generated=text[: parts[i]])
    while engine.has_unfinished():
        found |= {completion.key: completion.token_ids for completion in engine.step()}
    return [found[str(i)] for i in range(len(reference.prompts))]


def count_wrong(
    reference: Reference, texts: list[list[int]], result: Result, parts: list[int]
) -> int:
    """How many texts differ from the reference's otherwise than by a tie, which is noted.

    Also noted: a text that the reference, too, ends so when given the part up to where it differs,
    or the one it was resumed with (`parts`, in tokens), or when it computes prompt and text in two
    parts. Some models' text depends on what is computed at once, by what is next to a tie within
    them (experts, selected keys).
    """
    wrong = 0
    for i, found in enumerate(texts):
        prompt, expected = reference.prompts[i], reference.texts[i]
        if found == expected:
            continue
        place = next(
            (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None
        )
        if place is not None and reference.is_tie(
            prompt, expected[:place], found[place], expected[place]
        ):
            result.ties += 1
        elif (
            not reference.field
            and found
            in (
                reference.continued(prompt, expected[:place]),
                reference.continued(prompt, expected[: parts[i]]),
            )
        ) or (place is not None and not reference.field and reference.can_end_so(prompt, found)):
            result.recomputed_otherwise += 1
        else:
            wrong += 1
    return wrong


def cuts_for(config: Any, *, few: bool) -> list[str]:
    """Those of CUTS that an architecture is tried with."""
    names = list(FEW_CUTS) if few else list(CUTS)
    number = getattr(config.get_text_config(), "num_hidden_layers", None)
    return names if number == NUM_LAYERS else [name for name in names if name.isdigit()]


def examine(name: str, quantization: Quantization) -> Result:
    """Build and compare one entry of the table in this process.

    :param name: `architecture`, `architecture/rotary kind` or `architecture@field`
    """
    result = Result(name)
    architecture, _, field = name.partition("@")
    architecture, _, rope = architecture.partition("/")
    with tempfile.TemporaryDirectory(prefix="batchmill-support-") as scratch:
        folder = Path(scratch) / architecture
        try:
            save_small_model(architecture, folder, rope)
            config = AutoConfig.from_pretrained(folder)
            result.boundaries = boundaries(config)
            prompts = mixed_prompts(result.boundaries)
            reference = Reference(folder, prompts, quantization)
            logits = reference.logits(max(prompts, key=len))
            if field:
                reference = with_field(reference, field, result)
        except Exception as problem:  # any model code may fail in any way
            result.reason = _brief(problem)
            return result
        if not logits.isfinite().all():
            result.reason = "its logits aren't finite"
            return result
        _note_how_telling(reference, result)
        cuts = cuts_for(config, few=bool(rope or field))
        if field and not is_applied(field):
            cuts = cuts[:1]
        with Warnings() as warned:
            _compare_all(reference, cuts, result)
    if field and result.status in {"packed", "single", "mixed"}:
        _judge_field(field, warned.texts, result)
    return result


def _compare_all(reference: Reference, cuts: list[str], result: Result) -> None:
    """Run each partition and note what became of it."""
    problems, refusals, errors = [], [], []
    for cut in cuts:
        try:
            problems.append(compare(reference, cut, result))
        except ConfigurationError as refusal:
            refusals.append(f"{cut}: {_brief(refusal, name=False)}")
        except Exception as failure:
            errors.append(f"{cut} stages: {_brief(failure)}")
    modes = {mode for text in result.modes.values() for mode in text.split("/")}
    if any(problems):
        result.status, result.reason = "wrong", "; ".join(filter(None, problems))
    elif errors:
        result.status, result.reason = "error", "; ".join(errors)
    elif refusals:
        result.status, result.reason = "refused", _without_repetition(refusals, len(cuts))
    else:
        result.status = modes.pop() if len(modes) == 1 else "mixed"


# --------------------------------------------------------------------- generation config's fields


class Warnings(logging.Handler):
    """What the engine warns of about a model's generation config, while it is entered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> Warnings:
        _FIELDS_LOGGER.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        _FIELDS_LOGGER.removeHandler(self)


_FIELDS_LOGGER = logging.getLogger(model_defaults.__name__)


def with_field(plain: Reference, name: str, result: Result) -> Reference:
    """The same model with a telling value of the field in its generation config.

    What the engine leaves out, `generate` isn't given, either: the texts are those without.
    """
    # some fields are about what a text repeats of its prompt: each has some of its text in it
    prompts = [
        prompt + text[:3] if 1 < len(prompt) <= LONGEST - 3 else prompt
        for prompt, text in zip(plain.prompts, plain.texts, strict=True)
    ]
    plain = Reference(plain.folder, prompts)
    values = values_for(name, plain.texts)
    if is_applied(name):
        change_generation_config(plain.folder, values)
        changed = Reference(plain.folder, plain.prompts, field=name)
        pairs = zip(plain.texts, changed.texts, strict=True)
        result.changed = sum(before != after for before, after in pairs)
        return changed
    reference = Reference(plain.folder, plain.prompts, field=name)
    change_generation_config(plain.folder, values)
    return reference


def _judge_field(name: str, warnings: list[str], result: Result) -> None:
    """What exact texts prove of a field."""
    if not is_applied(name):
        if all(f"{name}=" in text for text in warnings) and len(warnings) == len(result.modes):
            result.status = "warned"
        else:
            result.status = "wrong"
            result.reason = f"left out, and no warning names it: {'; '.join(warnings) or 'none'}"
    elif name not in NO_EFFECT and not result.changed:
        result.status, result.reason = "unbuildable", "it changes no text of the small model"


def _note_how_telling(reference: Reference, result: Result) -> None:
    result.distinct_tokens = len({token for text in reference.texts for token in text})
    tokens = max(reference.prompts, key=len)[:12]
    swapped = [*tokens[:6], tokens[8], tokens[7], tokens[6], *tokens[9:]]
    result.sensitivity = relative_error(
        reference.logits(swapped)[-1:], reference.logits(tokens)[-1:]
    )


def _brief(problem: BaseException, *, name: bool = True) -> str:
    text = " ".join(str(problem).split())[:400]
    return f"{type(problem).__name__}: {text}" if name else text


def _without_repetition(refusals: list[str], num_cuts: int) -> str:
    texts = {text.split(": ", 1)[1] for text in refusals}
    if len(refusals) == num_cuts and len(texts) == 1:
        return texts.pop()
    return "; ".join(f"{text.replace(':', ' stages:', 1)}" for text in refusals)


# -------------------------------------------------------------------------------- all of them


def _child(name: str, quantization: Quantization, path: Path) -> None:
    started = time.perf_counter()
    result = examine(name, quantization)
    result.seconds = round(time.perf_counter() - started, 1)
    path.write_text(json.dumps(asdict(result)))


def examine_apart(name: str, quantization: Quantization, limit_s: float) -> Result:
    """`examine` in a forked process, which has everything imported and may die or hang."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        process = multiprocessing.get_context("fork").Process(
            target=_child, args=(name, quantization, path)
        )
        process.start()
        process.join(limit_s)
        timed_out = process.is_alive()
        if timed_out:
            process.kill()
            process.join()
        if path.exists():
            return Result(**json.loads(path.read_text()))
    cause = f"no result within {limit_s:.0f} s" if timed_out else f"died ({process.exitcode})"
    return Result(name, "error", cause)


def all_names(*, more: bool) -> list[str]:
    """The architectures; with more, each with its rotary kinds, and some with each field."""
    if not more:
        return list(ARCHITECTURES)
    rotary = [name for name in ARCHITECTURES if has_rope(name)]
    return [
        *ARCHITECTURES,
        *(f"{name}/{kind}" for name in rotary for kind in ROPE_KINDS),
        *(f"{name}@{field}" for name in FIELD_ARCHITECTURES for field in ALL_FIELDS),
    ]


def read_results(path: Path) -> dict[str, Result]:
    if not path.exists():
        return {}
    return {entry["name"]: Result(**entry) for entry in json.loads(path.read_text())["results"]}


def write_results(path: Path, results: dict[str, Result]) -> None:
    path.parent.mkdir(exist_ok=True)
    document = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "results": [asdict(results[name]) for name in sorted(results)],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


# -------------------------------------------------------------------------------- the table

_SECTIONS = {
    "packed": "Packed: token-identical, all sequences in one forward",
    "single": "Single: token-identical, sequence by sequence with a cache of transformers",
    "mixed": "Packed or single by stage: token-identical",
    "refused": "Refused when loaded, by name",
    "error": "Failed without a clear refusal",
    "wrong": "Silently wrong (this list has to be empty)",
    "unbuildable": "Not buildable from a small config",
}


def render(everything: dict[str, Result]) -> str:
    """docs/support.md."""
    fields = {name: result for name, result in everything.items() if "@" in name}
    ropes = {name: result for name, result in everything.items() if "/" in name and "@" not in name}
    results = {name: everything[name] for name in everything.keys() - fields.keys() - ropes.keys()}
    counts = Counter(result.status for result in results.values())
    exact = counts["packed"] + counts["single"] + counts["mixed"]
    lines = [
        "# Which architectures run",
        "",
        f"Written by `python benchmarks/support_table.py` with transformers "
        f"{transformers.__version__}. For each of the {len(results)} causal-LM architectures it "
        f"builds a small random model, writes 14 texts and more greedily in float32 with 1, 2 and "
        f"4 even and 2 and 3 uneven stages, and compares them with `transformers.generate` token "
        f"for token, and the logits of a prompt computed in chunks with the model's own forward "
        f"(of all at once, else in the same chunks). "
        f"Prompts have up to {LONGEST} tokens, of which 24 are computed at once. Four texts begin "
        f"shortly before, at and behind each length that the config names (windows, chunks, sparse "
        f"selections, original positions), and grow past it. Slots are too few for all, so that "
        f"some texts are preempted, and each text is written again, resumed from a part of itself. "
        f"Where the two best tokens are a tie up to rounding, either is right"
        f"{_otherwise(everything)}.",
        "",
        f"**{exact} are token-identical in every cut** ({counts['packed']} packed, "
        f"{counts['single']} single, {counts['mixed']} some of each); {counts['refused']} are "
        f"refused when loaded, {counts['error']} fail otherwise, {counts['unbuildable']} couldn't "
        f"be built. **Silently wrong: {counts['wrong']}.** What packed and single mean: "
        f"[engine.md](engine.md#packed-single-or-refused).",
    ]
    for status, title in _SECTIONS.items():
        chosen = [results[name] for name in sorted(results) if results[name].status == status]
        lines += ["", f"## {title} ({len(chosen)})", ""]
        if not chosen:
            lines.append("None.")
        elif status in {"packed", "single", "mixed"}:
            lines.append(", ".join(f"`{result.name}`" for result in chosen))
        else:
            lines += ["| architecture | why |", "|---|---|"]
            lines += [f"| `{result.name}` | {_explain(result)} |" for result in chosen]
    lines += ["", f"## Kinds of rotary positions ({len(ropes)})", "", *_rope_lines(ropes)]
    lines += ["", f"## Fields of generation_config ({len(fields)})", "", *_field_lines(fields)]
    return "\n".join(lines) + "\n"


def _otherwise(results: dict[str, Result]) -> str:
    names = [f"`{name}`" for name in sorted(results) if results[name].recomputed_otherwise]
    if not names:
        return ""
    return (
        f"; some texts of {', '.join(names)} are what the model itself makes when it computes the "
        "prompt, or prompt and text, in two parts, which isn't what it made of the prompt at once: "
        "an expert or a selected key is next to a tie within it"
    )


def _rope_lines(ropes: dict[str, Result]) -> list[str]:
    """A row for each rotary kind, and a list of what isn't exact with it."""
    lines = [
        "Each architecture whose config has rotary parameters, with each kind of them, uncut and "
        "in stages of 1 and 5 layers.",
        "",
        "| kind | packed | single or mixed | refused | failed | silently wrong | not buildable |",
        "|---|---|---|---|---|---|---|",
    ]
    others: dict[tuple[str, str], list[str]] = {}
    for kind in ROPE_KINDS:
        chosen = [ropes[name] for name in sorted(ropes) if name.endswith(f"/{kind}")]
        counts = Counter(result.status for result in chosen)
        exact = counts["single"] + counts["mixed"]
        rest = " | ".join(str(counts[s]) for s in ("refused", "error", "wrong", "unbuildable"))
        lines.append(f"| `{kind}` | {counts['packed']} | {exact} | {rest} |")
        for result in chosen:
            if result.status not in {"packed", "single", "mixed"}:
                name = result.name.partition("/")[0]
                others.setdefault((name, _explain(result)), []).append(kind)
    lines += ["", "| architecture | kinds | why not |", "|---|---|---|"]
    for (name, why), kinds in sorted(others.items()):
        lines.append(f"| `{name}` | {', '.join(kinds)} | {why} |")
    return lines


def _field_lines(fields: dict[str, Result]) -> list[str]:
    """A row for each field, a column for each architecture, and a list of what isn't right."""
    architectures = [name for name in FIELD_ARCHITECTURES if any(f"{name}@" in n for n in fields)]
    lines = [
        "Each field of a model's generation_config.json that the engine knows, uncut and in stages "
        "of 1 and 5 layers, with texts preempted and resumed. Packed, single and mixed: the text "
        "is that of `generate(do_sample=False)` with the same file, with a value of the field that "
        f"changes some texts ({', '.join(f'`{name}`' for name in sorted(NO_EFFECT))} change none "
        "of a greedy model whose logits are numbers). Warned: a warning names the field, and the "
        "text is made without it (uncut alone).",
        "",
        "| field | " + " | ".join(f"`{name}`" for name in architectures) + " |",
        "|---" * (1 + len(architectures)) + "|",
    ]
    for field_name in ALL_FIELDS:
        found = [fields.get(f"{name}@{field_name}") for name in architectures]
        if any(found):
            cells = " | ".join(result.status if result else "" for result in found)
            lines.append(f"| `{field_name}` | {cells} |")
    others = [r for _, r in sorted(fields.items()) if r.reason]
    if others:
        lines += ["", "| entry | why not |", "|---|---|"]
        lines += [f"| `{result.name}` | {_explain(result)} |" for result in others]
    return lines


def _explain(result: Result) -> str:
    """A cell that says why, and what works all the same."""
    texts: dict[str, list[str]] = {}
    for part in result.reason.split("; "):
        number, found, text = part.partition(" stages: ")
        if not found or number not in CUTS:  # the same for all, or a part of the one before
            texts.setdefault(part, [])
            continue
        texts.setdefault(text, []).append(number)
    parts = [f"{' and '.join(n)} stages: {text}" if n else text for text, n in texts.items()]
    if result.status == "refused" and "1" in result.modes:
        parts.insert(0, f"one stage is exact ({result.modes['1']})")
    whole = "; ".join(parts).replace("|", "\\|")
    return whole if len(whole) <= 300 else whole[:300] + " …"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures")
    parser.add_argument("--status", nargs="+", help="again, those that had such a result")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    parser.add_argument("--limit-s", type=float, default=180, help="time for each architecture")
    parser.add_argument("--quantization", choices=["none", "int8"], default="none")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    is_plain = args.quantization == "none"
    if args.results is None:
        args.results = RESULTS if is_plain else RESULTS.with_stem(f"support-{args.quantization}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.lastResort = (
        logging.NullHandler()
    )  # what the engine says of each model is for _judge_field
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results = read_results(args.results)
    todo = args.only or all_names(more=is_plain)
    if args.status:
        todo = [name for name in todo if name in results and results[name].status in args.status]
    elif not args.only and not args.again:
        todo = [name for name in todo if name not in results]
    if todo:
        examine("llama", args.quantization)  # Imports all that the children share.
        gc.freeze()  # a fifth of the time went into looking for garbage in what is imported
    for i, name in enumerate(todo):
        result = results[name] = examine_apart(name, args.quantization, args.limit_s)
        write_results(args.results, results)
        modes = result.modes.get("4", "")
        print(
            f"{i + 1}/{len(todo)} {name}: {result.status} {modes} {result.seconds} s "
            f"error {result.logit_error:.0e} ties {result.ties} distinct {result.distinct_tokens} "
            f"recomputed otherwise {result.recomputed_otherwise} "
            f"changed {result.changed} boundaries {result.boundaries} "
            f"preemptions {result.preemptions} "
            f"sensitivity {result.sensitivity:.0e} {result.reason[:300]}",
            file=sys.stderr,
            flush=True,
        )
    if is_plain:
        args.table.write_text(render(results))
    print(json.dumps(Counter(result.status for result in results.values())))


if __name__ == "__main__":
    main()
