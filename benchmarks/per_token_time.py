"""Whether a token costs more the longer the text is: late steps against early ones.

A ratio near 1 says that nothing grows with the text but the attention itself: no cache is copied,
concatenated or moved from step to step. Attention reads the whole cache, so its share does grow;
the table gives the bytes that a step reads, weights and cache, and the ratio they would explain.
The model has to be large enough that its step isn't mostly Python.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from random_llama import VOCAB_SIZES, random_llama, random_prompt
from rich.console import Console
from rich.table import Table

from engine.config import EngineConfig
from engine.engine import Engine
from queue_api.schemas import GenerationRequest, SamplingParams


def step_times(engine: Engine, prompt: list[int], new: int) -> list[float]:
    """Seconds of each decode step."""
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    engine.add("r", GenerationRequest(id="r", prompt=prompt, sampling=params))
    steps = []
    while engine.has_unfinished():
        started = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - started)
    return steps[1:]


def measure(folder: Path, prompt: list[int], lengths: list[int]) -> Table:
    engine = Engine.load(EngineConfig(str(folder), max_num_seqs=1))
    step_times(engine, prompt, 20)
    weights = sum(p.nbytes for stage in engine.stages for p in stage.model.parameters())
    slot = sum(stage.slot_bytes for stage in engine.stages)
    table = Table(title=f"one text, {len(prompt)} prompt tokens, medians of each fifth")
    for column in ("new tokens", "early (ms)", "late (ms)", "late / early", "by bytes read"):
        table.add_column(column, justify="right")
    for new in lengths:
        steps = step_times(engine, prompt, new)
        fifth = len(steps) // 5
        early, late = statistics.median(steps[:fifth]), statistics.median(steps[-fifth:])
        bytes_early = weights + slot * (len(prompt) + new // 10)
        bytes_late = weights + slot * (len(prompt) + new - new // 10)
        table.add_row(
            str(new),
            f"{1e3 * early:.2f}",
            f"{1e3 * late:.2f}",
            f"{late / early:.2f}",
            f"{bytes_late / bytes_early:.2f}",
        )
    engine.close()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["M1", "M2"], default="M1")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[50, 500])
    args = parser.parse_args()
    prompt = random_prompt(args.prompt_tokens, 0, VOCAB_SIZES[args.model])
    with random_llama(args.model) as folder:
        Console().print(measure(folder, prompt, args.new_tokens))


if __name__ == "__main__":
    main()
