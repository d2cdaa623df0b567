"""When each stage of a threaded pipeline works and when it waits: a picture, and idle shares.

Two runs through the whole engine, prompts of 16 to 64 tokens and 24 new ones each:

* `real`: M2 in two stages on the CPU, a thread each. Two cores have nothing left then for the
  engine's own thread, which packs, samples and schedules.
* `emulated`: the demo model in four stages, each of which computes and then waits until
  `--stage-ms` are over, as if it were a larger one on a device of its own. The waiting is all that
  is made up.

`turn` is the median time from a micro-batch leaving the last stage to the next one's beginning in
the first: sampling, scheduling, packing, and waiting if the first is busy.

A stage is idle when it has no micro-batch. The share is of the time from when the last stage got
its first micro-batch to when the first stage ended its last: the pipe's filling and draining is
left out.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from random_llama import VOCAB_SIZES, random_llama, random_prompt
from rich.console import Console
from rich.table import Table

from engine.batch import ForwardBatch
from engine.config import EngineConfig
from engine.demo_model import DEMO_MODEL_PATH
from engine.engine import Engine
from queue_api.wire.schemas import GenerationRequest, SamplingParams

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
NEW_TOKENS = 24


@dataclass(frozen=True)
class Run:
    """One micro-batch in one stage; seconds."""

    stage: int
    batch: int
    num_tokens: int
    num_seqs: int
    began: float
    ended: float


class Recorder:
    """Collects runs as a pipeline's trace."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self._numbers: dict[int, int] = {}
        self._batches: list[ForwardBatch] = []  # kept, or another would get the same id
        self._lock = threading.Lock()

    def __call__(self, stage: int, batch: ForwardBatch, began: float, ended: float) -> None:
        with self._lock:
            if id(batch) not in self._numbers:
                self._numbers[id(batch)] = len(self._batches)
                self._batches.append(batch)
            number, sizes = self._numbers[id(batch)], (batch.num_tokens, len(batch.segments))
            self.runs.append(Run(stage, number, *sizes, began, ended))


@dataclass(frozen=True)
class Timeline:
    title: str
    num_stages: int
    runs: Sequence[Run]

    def steady(self) -> tuple[float, float]:
        """From the last stage's first micro-batch to the end of the first stage's last one."""
        last = self.num_stages - 1
        begin = min(run.began for run in self.runs if run.stage == last)
        return begin, max(run.ended for run in self.runs if run.stage == 0)

    def turn_s(self) -> float:
        """Median time from a micro-batch's end to the beginning of the one that its end lets in."""
        last = self.num_stages - 1
        ends = {run.batch: run.ended for run in self.runs if run.stage == last}
        begins = {run.batch: run.began for run in self.runs if run.stage == 0}
        followed = (batch for batch in ends if batch + self.num_stages in begins)
        return statistics.median(begins[b + self.num_stages] - ends[b] for b in followed)

    def idle_shares(self, span: tuple[float, float]) -> list[float]:
        begin, end = span
        shares = []
        for stage in range(self.num_stages):
            own = [run for run in self.runs if run.stage == stage]
            busy = sum(max(0.0, min(r.ended, end) - max(r.began, begin)) for r in own)
            shares.append(1 - busy / (end - begin))
        return shares


# ------------------------------------------------------------------------------------ the runs


def record(engine: Engine, vocab_size: int, num_texts: int) -> list[Run]:
    """Generate for `num_texts` requests that are all there at the beginning."""
    recorder = Recorder()
    for i in range(num_texts):
        prompt = random_prompt(16 + 48 * i // num_texts, i, vocab_size)
        params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
        engine.add(str(i), GenerationRequest(id=str(i), prompt=prompt, sampling=params))
    engine.pipeline.trace = recorder
    while engine.has_unfinished():
        engine.step()
    engine.pipeline.trace = None
    return recorder.runs


def real(num_texts: int) -> Timeline:
    """M2 in two stages, one thread each."""
    with random_llama("M2") as folder:
        config = EngineConfig(
            str(folder),
            devices=("cpu", "cpu"),
            partition="compute",
            pipeline="threads",
            num_threads=2,
            kv_cache_tokens=64 * 128,
        )
        engine = Engine.load(config)
        record(engine, VOCAB_SIZES["M2"], 8)
        runs = record(engine, VOCAB_SIZES["M2"], num_texts)
        engine.close()
    return Timeline(f"2 stages of M2, one CPU thread each, {num_texts} texts", 2, runs)


def emulated(num_texts: int, stage_s: float) -> Timeline:
    """The demo model in four stages that take `stage_s` each, or more where computing does."""
    config = EngineConfig(
        str(DEMO_MODEL_PATH), devices=("cpu",) * 4, pipeline="threads", num_threads=1
    )
    engine = Engine.load(config)
    for stage in engine.stages:
        run = stage.run

        def slow(batch: ForwardBatch, inbound: torch.Tensor, run=run) -> torch.Tensor:  # type: ignore[no-untyped-def]
            ends = time.perf_counter() + stage_s
            out = run(batch, inbound)
            time.sleep(max(0.0, ends - time.perf_counter()))
            return out

        stage.run = slow  # type: ignore[method-assign]
    size = engine.stages[0].model.config.vocab_size
    runs = record(engine, size, num_texts)
    engine.close()
    title = f"4 stages, emulated: each waits until {1e3 * stage_s:.0f} ms are over"
    return Timeline(f"{title}, {num_texts} texts", 4, runs)


# --------------------------------------------------------------------------- table and picture


def idle_table(timelines: Sequence[Timeline]) -> Table:
    table = Table(title="share of the time in which a stage has no micro-batch")
    for column in ("run", "stage", "micro-batches", "median ms", "turn ms", "idle"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for line in timelines:
        for stage, idle in enumerate(line.idle_shares(line.steady())):
            own = [run.ended - run.began for run in line.runs if run.stage == stage]
            middle = 1e3 * statistics.median(own)
            turn = "" if stage else f"{1e3 * line.turn_s():.1f}"
            title = "" if stage else line.title
            row = (title, str(stage), str(len(own)), f"{middle:.1f}", turn, f"{idle:.1%}")
            table.add_row(*row)
    return table


WIDTH, LEFT, ROW = 900, 70, 24  # pixels: of the picture, of the stages' names, of a stage's row


def picture(timelines: Sequence[Timeline]) -> str:
    """An SVG with a band per timeline."""
    parts: list[str] = []
    top = 10
    for line in timelines:
        parts += _band(line, top)
        top += 20 + line.num_stages * ROW + 32
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" '
    head += 'font-family="sans-serif" font-size="12">'
    paper = f'<rect width="{WIDTH}" height="{top}" fill="white"/>'
    return "\n".join([head, paper, *parts, "</svg>\n"])


def _band(line: Timeline, top: int, num_shown: int = 10) -> list[str]:
    """The SVG elements of ten micro-batches' time out of the middle of a timeline."""
    starts = sorted(run.began for run in line.runs if run.stage == 0)
    middle = len(starts) // 2
    begin, end = starts[middle], starts[min(len(starts) - 1, middle + num_shown)]
    scale = (WIDTH - LEFT - 10) / (end - begin)
    idle = ", ".join(f"{share:.1%}" for share in line.idle_shares(line.steady()))
    parts = [f'<text x="{LEFT}" y="{top + 12}">{line.title}; idle: {idle}</text>']
    top += 20
    for run in line.runs:
        if run.ended <= begin or run.began >= end:
            continue
        x = LEFT + (max(run.began, begin) - begin) * scale
        width = (min(run.ended, end) - max(run.began, begin)) * scale
        y, colour = top + run.stage * ROW, COLOURS[run.batch % line.num_stages]
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 4}" fill="{colour}">'
            f"<title>micro-batch {run.batch}, {run.num_seqs} texts, {run.num_tokens} tokens, "
            f"{1e3 * (run.ended - run.began):.1f} ms</title></rect>"
        )
    parts += [
        f'<text x="5" y="{top + stage * ROW + 14}">stage {stage}</text>'
        for stage in range(line.num_stages)
    ]
    bottom, shown = top + line.num_stages * ROW + 12, f"{1e3 * (end - begin):.0f} ms shown"
    parts.append(f'<text x="{WIDTH - 10}" y="{bottom}" text-anchor="end">{shown}</text>')
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", choices=["real", "emulated"], default=None)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--stage-ms", type=float, default=40.0)
    parser.add_argument("--picture", type=Path, help="where to write the SVG")
    args = parser.parse_args()
    timelines = []
    for name in args.runs or ["real", "emulated"]:
        work = real(args.texts) if name == "real" else emulated(args.texts, args.stage_ms / 1e3)
        timelines.append(work)
    Console().print(idle_table(timelines))
    if args.picture:
        args.picture.write_text(picture(timelines))


if __name__ == "__main__":
    main()
