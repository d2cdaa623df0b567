"""Whether a token costs more the longer the text is: the 2,000th new token against the 100th.

A decode step of one text reads each weight and the text's whole cache once, so bytes read say by
how much a step has to grow. What grows beyond that would be something copied, concatenated or moved
from step to step. Times are the process's CPU time on one thread, which a machine with other
programs on it disturbs less than the clock; each is the median of a window of steps, and the ratio
the median of several texts' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from random_llama import VOCAB_SIZES, random_llama, random_prompt
from rich.console import Console
from rich.table import Table

from engine.config import EngineConfig
from engine.engine import Engine
from queue_api.wire.schemas import GenerationRequest, SamplingParams

WINDOW = 50
"""Steps around a place in the text whose median counts."""


@dataclass(frozen=True)
class BytesRead:
    """What a decode step of one text reads."""

    weights: int
    """The embedding excepted, of which it is one row."""
    slot: int
    """Of the cache, for one token of the text."""

    @classmethod
    def of(cls, engine: Engine) -> BytesRead:
        models = [stage.model for stage in engine.stages]
        embedding = models[0].get_input_embeddings()
        weights = sum(p.numel() * p.element_size() for m in models for p in m.parameters())
        embedded = sum(p.numel() * p.element_size() for p in embedding.parameters())
        return cls(weights - embedded, sum(stage.slot_bytes for stage in engine.stages))

    def at(self, num_tokens: int) -> int:
        return self.weights + self.slot * num_tokens


def step_times(engine: Engine, prompt: list[int], new: int) -> list[float]:
    """CPU seconds of the step of each new token, the prompt's first."""
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    engine.add("r", GenerationRequest(id="r", prompt=prompt, sampling=params))
    steps = []
    while engine.has_unfinished():
        started = time.process_time()
        engine.step()
        steps.append(time.process_time() - started)
    return steps


def measure(folder: Path, prompt: list[int], places: Sequence[int], num_texts: int) -> Table:
    """A row per place in the text: milliseconds and bytes, and both over the first place's."""
    config = EngineConfig(str(folder), max_num_seqs=1, num_threads=1, kv_cache_tokens=4096)
    engine = Engine.load(config)
    step_times(engine, prompt, 20)
    bytes_read = BytesRead.of(engine)
    texts = []
    for _ in range(num_texts):
        steps = step_times(engine, prompt, max(places) + WINDOW // 2)
        windows = [steps[place - WINDOW // 2 : place + WINDOW // 2] for place in places]
        texts.append([statistics.median(window) for window in windows])
    engine.close()
    table = Table(title=f"one text, {len(prompt)} prompt tokens, one thread, {num_texts} texts")
    for column in ("new tokens", "CPU ms", "of the first", "lowest, highest", "MB", "by bytes"):
        table.add_column(column, justify="right")
    first = bytes_read.at(len(prompt) + places[0])
    for i, place in enumerate(places):
        ratios = [text[i] / text[0] for text in texts]
        needed = bytes_read.at(len(prompt) + place)
        table.add_row(
            f"{place:,}",
            f"{1e3 * statistics.median(text[i] for text in texts):.2f}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f}, {max(ratios):.3f}",
            f"{needed / 1e6:.1f}",
            f"{needed / first:.3f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["M1", "M2"], default="M1")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--at", type=int, nargs="+", default=[100, 500, 1000, 2000])
    parser.add_argument("--texts", type=int, default=5)
    args = parser.parse_args()
    if min(args.at) < WINDOW or max(args.at) + args.prompt_tokens + WINDOW > 4096:
        parser.error(f"--at wants tokens between {WINDOW} and {4096 - args.prompt_tokens - WINDOW}")
    prompt = random_prompt(args.prompt_tokens, 0, VOCAB_SIZES[args.model])
    with random_llama(args.model) as folder:
        Console().print(measure(folder, prompt, args.at, args.texts))


if __name__ == "__main__":
    main()
