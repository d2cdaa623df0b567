"""Which architectures the engine runs, and that none of them is silently wrong.

For every causal-LM architecture of the installed transformers: build a small random model, write 16
texts greedily in float32 with 1, 2 and 4 stages, and compare them with `transformers.generate`
token for token, and the logits of a prompt computed in chunks with the model's own forward. Each
one runs in a process of its own with a time limit; results are kept as JSON, so that a sweep that
was stopped goes on where it was. At the end the table in docs/support.md is written.

    python benchmarks/support_table.py [--only NAME ...] [--again]

With `--quantization int8` the engine's text is compared with that of a model whose layers' weights
are quantized by PyTorch; its results are kept apart and no table is written.
"""

from __future__ import annotations

import argparse
import inspect
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

import torch
import transformers
from small_models import ARCHITECTURES, VOCAB, save_small_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from engine.batch import ForwardBatch, Segment
from engine.config import EngineConfig, Quantization
from engine.engine import Engine
from engine.models.slicing import find_layers
from queue_api.wire.errors import ConfigurationError
from queue_api.wire.schemas import GenerationRequest, SamplingParams

RESULTS = Path(__file__).parent / "results" / "support.json"
TABLE = Path(__file__).parents[1] / "docs" / "support.md"
STAGES = (1, 2, 4)
NEW_TOKENS = 16
MAX_LEN = 96
CHUNKS = (13, 1, 1, 9, 1, 5)
LOGIT_TOLERANCE = 1e-3
"""Of the logits' relative error. Wrong masks and positions make errors of 0.01 and more."""
TIE = 1e-4
"""Two logits nearer than this, relative to their spread over the vocabulary, are a tie."""


@dataclass
class Result:
    """What became of one architecture."""

    name: str
    status: str = "unbuildable"
    """packed, single, mixed, refused, unbuildable, wrong, or error: not refused, but failed."""
    reason: str = ""
    modes: dict[str, str] = field(default_factory=dict)
    """Number of stages to how each runs."""
    ties: int = 0
    """Texts that left `generate`'s at a near tie."""
    logit_error: float = 0.0
    """The largest relative error of the logits over all partitions."""
    distinct_tokens: int = 0
    """Different tokens in the reference's texts: few of them would prove little."""
    sensitivity: float = 0.0
    """How much the last logits change if two earlier tokens change places."""
    seconds: float = 0.0


# --------------------------------------------------------------------------------- one of them


def mixed_prompts() -> list[list[int]]:
    """16 prompts of 1 to 36 random tokens, from a fixed seed."""
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 2, 3, 36, *torch.randint(4, 36, (12,), generator=generator).tolist()]
    return [torch.randint(8, VOCAB, (n,), generator=generator).tolist() for n in lengths]


class Reference:
    """transformers' own model and its texts."""

    def __init__(self, folder: Path, prompts: list[list[int]], quantization: Quantization) -> None:
        self.folder, self.prompts, self.quantization = folder, prompts, quantization
        text = (folder / "config.json").read_text()
        # transformers before 5.23 leaves soft-capping out of its default attention.
        kwargs = {"attn_implementation": "eager"} if "attn_logit_softcapping" in text else {}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)
        self.model.eval()
        if quantization == "int8":
            for layer in getattr(*find_layers(self.model)):
                _round(layer)
        self.texts = [self._greedy(prompt) for prompt in prompts]

    @torch.inference_mode()
    def _greedy(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), V], from one forward without a cache, called as `generate` does."""
        ids = torch.tensor([tokens])
        kwargs = {"use_cache": False, "attention_mask": torch.ones_like(ids)}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            kwargs["position_ids"] = torch.arange(len(tokens))[None]
        logits: torch.Tensor = self.model(ids, **kwargs).logits[0]
        return logits

    def is_tie(self, tokens: list[int], one: int, other: int) -> bool:
        """True if both tokens are equally good behind `tokens`, up to rounding."""
        last = self.logits(tokens)[-1]
        return bool((last[one] - last[other]).abs() <= TIE * (last.max() - last.min()))


def _round(layer: torch.nn.Module) -> None:
    linears = {m for m in layer.modules() if type(m) is torch.nn.Linear and m.weight.numel()}
    for linear in linears:
        weight = linear.weight.detach()
        scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30)
        linear.weight = torch.nn.Parameter((weight / scales[:, None]).round() * scales[:, None])


def engine_logits(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """The engine's logits after each of CHUNKS, run through its stages by hand."""
    outputs, past = [], 0
    for count in CHUNKS:
        batch = ForwardBatch(
            segments=[Segment(0, count, past, 3, 10_000)],
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


def compare(reference: Reference, num_stages: int, result: Result) -> str:
    """Run one partition; what is wrong with it, or nothing.

    :raises ConfigurationError: if the engine refuses the model
    """
    engine = Engine.load(
        EngineConfig(
            str(reference.folder),
            dtype="float32",
            quantization=reference.quantization,
            devices=("cpu",) * num_stages,
            max_num_seqs=16,
            max_batch_tokens=24,  # below the longest prompts: they are read among decodes
            max_model_len=MAX_LEN,
        )
    )
    prompts = reference.prompts
    result.modes[str(num_stages)] = "/".join(stage.mode for stage in engine.stages)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    requests = [
        GenerationRequest(id=str(i), prompt=prompt, sampling=params)
        for i, prompt in enumerate(prompts)
    ]
    wrong = 0
    for prompt, expected, completion in zip(
        prompts, reference.texts, engine.generate(requests), strict=True
    ):
        found = completion.token_ids
        if found == expected:
            continue
        place = next(
            (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None
        )
        if place is not None and reference.is_tie(
            prompt + expected[:place], found[place], expected[place]
        ):
            result.ties += 1
        else:
            wrong += 1
    probe = max(prompts, key=len)[: sum(CHUNKS)]
    ends = torch.tensor(CHUNKS).cumsum(0) - 1
    error = relative_error(engine_logits(engine, probe), reference.logits(probe)[ends])
    result.logit_error = max(result.logit_error, error)
    engine.close()
    problems = []
    if wrong:
        problems.append(f"{wrong} of {len(prompts)} texts differ")
    if not error <= LOGIT_TOLERANCE:
        problems.append(f"logits are off by {error:.1e}")
    return f"{num_stages} stages: {', '.join(problems)}" if problems else ""


def examine(name: str, quantization: Quantization) -> Result:
    """Build and compare one architecture, in this process."""
    result = Result(name)
    prompts = mixed_prompts()
    with tempfile.TemporaryDirectory(prefix="batchmill-support-") as scratch:
        folder = Path(scratch) / name
        try:
            save_small_model(name, folder)
            reference = Reference(folder, prompts, quantization)
            logits = reference.logits(max(prompts, key=len))
        except Exception as problem:  # any model code may fail in any way
            result.reason = _brief(problem)
            return result
        if not logits.isfinite().all():
            result.reason = "its logits aren't finite"
            return result
        _note_how_telling(reference, prompts, result)
        problems, refusals, errors = [], [], []
        for num_stages in STAGES:
            try:
                problems.append(compare(reference, num_stages, result))
            except ConfigurationError as refusal:
                refusals.append(f"{num_stages}: {_brief(refusal, name=False)}")
            except Exception as failure:
                errors.append(f"{num_stages} stages: {_brief(failure)}")
    modes = {mode for text in result.modes.values() for mode in text.split("/")}
    if any(problems):
        result.status, result.reason = "wrong", "; ".join(filter(None, problems))
    elif errors:
        result.status, result.reason = "error", "; ".join(errors)
    elif refusals:
        result.status, result.reason = "refused", _without_repetition(refusals)
    else:
        result.status = modes.pop() if len(modes) == 1 else "mixed"
    return result


def _note_how_telling(reference: Reference, prompts: list[list[int]], result: Result) -> None:
    result.distinct_tokens = len({token for text in reference.texts for token in text})
    tokens = max(prompts, key=len)[:12]
    swapped = [*tokens[:6], tokens[8], tokens[7], tokens[6], *tokens[9:]]
    result.sensitivity = relative_error(
        reference.logits(swapped)[-1:], reference.logits(tokens)[-1:]
    )


def _brief(problem: BaseException, *, name: bool = True) -> str:
    text = " ".join(str(problem).split())[:400]
    return f"{type(problem).__name__}: {text}" if name else text


def _without_repetition(refusals: list[str]) -> str:
    texts = {text.split(": ", 1)[1] for text in refusals}
    if len(refusals) == len(STAGES) and len(texts) == 1:
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


def render(results: dict[str, Result]) -> str:
    """docs/support.md."""
    counts = Counter(result.status for result in results.values())
    exact = counts["packed"] + counts["single"] + counts["mixed"]
    lines = [
        "# Which architectures run",
        "",
        f"Written by `python benchmarks/support_table.py` with transformers "
        f"{transformers.__version__}. For each of the {len(results)} causal-LM architectures it "
        f"builds a small random model, writes 16 texts of mixed lengths greedily in float32 with "
        f"1, 2 and 4 stages, and compares them with `transformers.generate` token for token, and "
        f"the logits of a prompt computed in chunks with the model's own forward. Where the two "
        f"best tokens are a tie up to rounding, either is right. Windows, chunks and sparse "
        f"selections are small enough to matter within these texts.",
        "",
        f"**{exact} are token-identical with 1, 2 and 4 stages** ({counts['packed']} packed, "
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
    return "\n".join(lines) + "\n"


def _explain(result: Result) -> str:
    """A cell that says why, and what works all the same."""
    texts: dict[str, list[str]] = {}
    for part in result.reason.split("; "):
        number, found, text = part.partition(" stages: ")
        if not found or not number.isdigit():  # the same for all, or a part of the one before
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
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results = read_results(args.results)
    todo = args.only or ARCHITECTURES
    if args.status:
        todo = [name for name in todo if name in results and results[name].status in args.status]
    elif not args.only and not args.again:
        todo = [name for name in todo if name not in results]
    if todo:
        examine("llama", args.quantization)  # Imports all that the children share.
    for i, name in enumerate(todo):
        result = results[name] = examine_apart(name, args.quantization, args.limit_s)
        write_results(args.results, results)
        modes = result.modes.get(str(STAGES[-1]), "")
        print(
            f"{i + 1}/{len(todo)} {name}: {result.status} {modes} {result.seconds} s "
            f"error {result.logit_error:.0e} ties {result.ties} distinct {result.distinct_tokens} "
            f"sensitivity {result.sensitivity:.0e} {result.reason[:300]}",
            file=sys.stderr,
            flush=True,
        )
    if is_plain:
        args.table.write_text(render(results))
    print(json.dumps(Counter(result.status for result in results.values())))


if __name__ == "__main__":
    main()
