"""Medians, ratios and shares; the table, the JSON file and the picture."""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.throughput.contest import BATCHMILL
from benchmarks.throughput.rounds import Entry, Harness, ModelRun

__all__ = ["draw", "summarize", "table"]

logger = logging.getLogger(__name__)

OURS = "#c2410c"
OTHERS = "#64748b"


def summarize(runs: list[ModelRun], harness: Harness, absent: Mapping[str, str]) -> dict[str, Any]:
    """Everything that was measured and what follows from it, ready for JSON."""
    return {
        "machine": {
            "processor": _processor(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": harness.cores,
            "threads": harness.threads,
            "load_average": os.getloadavg(),
        },
        "command": ["python", "-m", "benchmarks.throughput", *sys.argv[1:]],
        "absent": dict(absent),
        "models": {run.spec.name: _model(run) for run in runs},
    }


def _model(run: ModelRun) -> dict[str, Any]:
    limit = _limit(run)
    engines = {e.contestant.key: _engine(e, run, limit["tokens_per_s"]) for e in run.entries}
    ours = engines.get(BATCHMILL, {}).get("tokens_per_s")
    for engine in engines.values():
        if ours and "tokens_per_s" in engine:
            engine["batchmill_ratio"] = ours / engine["tokens_per_s"]
    work = run.workload
    return {
        "requests": len(work.prompts),
        "prompt_tokens": work.num_prompt_tokens,
        "output_tokens": work.num_output_tokens,
        "flops": run.spec.flops(work.num_forward_tokens, work.num_output_tokens),
        "gemm_limit": limit,
        "engines": engines,
    }


def _limit(run: ModelRun) -> dict[str, Any]:
    """Time of the workload's matrix products alone, with the fastest kernel and batch measured.

    The layers take each token that is fed, the head one row per output token.
    """
    passes = []
    for same in zip(*run.gemm, strict=True):  # the same kernel and rows in every round
        medians = {key: _median(same, key) for key in same[0] if key != "kernel"}
        passes.append({**same[0], **medians})
    layers = min(passes, key=lambda p: p["layers_s"] / p["rows"])
    head = min(passes, key=lambda p: p["head_s"] / p["rows"])
    work = run.workload
    seconds = (
        work.num_forward_tokens * layers["layers_s"] / layers["rows"]
        + work.num_output_tokens * head["head_s"] / head["rows"]
    )
    return {
        "tokens_per_s": work.num_output_tokens / seconds,
        "gflops": run.spec.flops(work.num_forward_tokens, work.num_output_tokens) / seconds / 1e9,
        "layers_at": f"{layers['kernel']}, {layers['rows']} rows",
        "head_at": f"{head['kernel']}, {head['rows']} rows",
        "passes": passes,
    }


def _engine(entry: Entry, run: ModelRun, limit: float) -> dict[str, Any]:
    shared = {
        "title": entry.contestant.title,
        "settings": dict(entry.settings),
        "versions": dict(entry.versions),
    }
    if entry.error is not None:
        return {**shared, "error": entry.error}
    speeds = [r["output_tokens"] / r["elapsed_s"] for r in entry.rounds]
    asked = sum(run.workload.outputs[i] for i in entry.indices)
    return {
        **shared,
        "requests": len(entry.indices),
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_rounds": speeds,
        "share_of_limit": statistics.median(speeds) / limit,
        "cpu_use": statistics.median(r["cpu_s"] / r["elapsed_s"] for r in entry.rounds),
        "load_s": _median(entry.rounds, "load_s"),
        "loaded_bytes": _median(entry.rounds, "loaded_bytes"),
        "peak_bytes": _median(entry.rounds, "peak_bytes"),
        "equal_requests": entry.num_equal,
        "matching_tokens": entry.num_matching_tokens / asked,
    }


def _median(rows: Any, key: str) -> float:
    return statistics.median(row[key] for row in rows)


def table(name: str, model: Mapping[str, Any]) -> str:
    """One model's results in Markdown."""
    limit = model["gemm_limit"]
    lines = [
        f"### {name}: {model['requests']} requests, {model['prompt_tokens']:,} prompt and "
        f"{model['output_tokens']:,} output tokens, {model['flops'] / 1e12:.2f} TFLOP",
        "",
        "| engine | output tok/s | min to max | batchmill is | of the GEMM limit | cores used | "
        "peak memory | requests equal to HF fp32 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| the GEMM limit ({limit['layers_at']}) | {_number(limit['tokens_per_s'])}"
        " | | | 100 % | | | |",
    ]
    for engine in _ranked(model):
        speeds = engine["tokens_per_s_rounds"]
        ratio = engine.get("batchmill_ratio")
        lines.append(
            f"| {engine['title']}"
            f" | {_number(engine['tokens_per_s'])}"
            f" | {_number(min(speeds))} to {_number(max(speeds))}"
            f" | {f'{ratio:.2f} x' if ratio else ''}"
            f" | {engine['share_of_limit']:.0%}".replace("%", " %")
            + f" | {engine['cpu_use']:.1f}"
            f" | {engine['peak_bytes'] / 2**20:,.0f} MiB"
            f" | {engine['equal_requests']} of {engine['requests']} |"
        )
    failed = [e for e in model["engines"].values() if "error" in e]
    lines += [f"| {e['title']} | failed: {e['error']} | | | | | | |" for e in failed]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _ranked(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    done = [e for e in model["engines"].values() if "tokens_per_s" in e]
    return sorted(done, key=lambda e: -e["tokens_per_s"])


def draw(summary: Mapping[str, Any], path: Path) -> bool:
    """Bars of tokens per second, one panel a model. False if matplotlib isn't installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "batchmill"  # the same numbers give the same file
    from matplotlib import pyplot as plt

    models = summary["models"]
    sizes = [len(_ranked(m)) for m in models.values()]
    figure, panels = plt.subplots(
        len(models),
        1,
        squeeze=False,
        figsize=(9, 1.6 * len(models) + 0.34 * sum(sizes)),
        height_ratios=[max(size, 1) for size in sizes],
        layout="constrained",
    )
    for axes, (name, model) in zip(panels[:, 0], models.items(), strict=True):
        _panel(axes, name, model)
    machine = summary["machine"]
    figure.suptitle(f"{machine['processor']}, {machine['threads']} threads, fp32", fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    plt.close(figure)
    return True


def _panel(axes: Any, name: str, model: Mapping[str, Any]) -> None:
    engines = _ranked(model)[::-1]
    speeds = [e["tokens_per_s"] for e in engines]
    low = [e["tokens_per_s"] - min(e["tokens_per_s_rounds"]) for e in engines]
    high = [max(e["tokens_per_s_rounds"]) - e["tokens_per_s"] for e in engines]
    colors = [OURS if e["title"].startswith("batchmill") else OTHERS for e in engines]
    titles = [e["title"] for e in engines]
    bars = axes.barh(titles, speeds, xerr=[low, high], color=colors, ecolor="#1e293b", capsize=2)
    axes.bar_label(bars, [f" {_number(s)}" for s in speeds], padding=4, fontsize=9)
    limit = model["gemm_limit"]["tokens_per_s"]
    axes.axvline(limit, color="#0f766e", linestyle="--", linewidth=1)
    axes.text(
        limit,
        0.02,
        "GEMM limit ",
        color="#0f766e",
        fontsize=8,
        ha="right",
        transform=axes.get_xaxis_transform(),
    )
    axes.set_xlim(0, 1.12 * max(limit, *speeds) if speeds else limit)
    axes.set_title(f"{name}: {model['requests']} requests, output tokens per second", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        logger.debug("no /proc/cpuinfo")
    return platform.processor() or platform.machine()


def write(summary: Mapping[str, Any], path: Path) -> None:
    """The whole of it, as JSON."""
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
