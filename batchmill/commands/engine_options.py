"""The command line's options about the engine, each with the name of its setting."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import typer

from batchmill.commands.options import GENERATION_DEFAULTS, option_group
from workers.settings import DEMO_MODEL

__all__ = ["EngineFlags", "plan_engine_options", "worker_engine_options"]

EngineFlags: TypeAlias = dict[str, Any]
"""A value to each setting of `WorkerSettings` that an option was there for; None: not given."""

_PLACEMENT: dict[str, Any] = {
    "model": Annotated[
        str | None,
        typer.Option(
            help="A local folder, a Hub id, or `demo`: the toy that comes with batchmill. "
            f"Default: $BATCHMILL_MODEL or {DEMO_MODEL}.",
            show_default=False,
        ),
    ],
    "stages": Annotated[
        str | None,
        typer.Option(
            help="A device per stage, in order, such as cpu,cpu or cuda:0,cpu. "
            "Default: $BATCHMILL_STAGES or cpu.",
            show_default=False,
        ),
    ],
    "partition": Annotated[
        str | None,
        typer.Option(
            help="How layers are shared out: uniform, memory, compute, mixed or custom (uniform).",
            show_default=False,
        ),
    ],
}

_ENGINE: dict[str, Any] = {
    "revision": Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)
    ],
    "layer_bounds": Annotated[
        str | None,
        typer.Option(
            help="custom: the first layer of every stage but the first, such as 3,6.",
            show_default=False,
        ),
    ],
    "dtype": Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default=False)
    ],
    "quantization": Annotated[
        str | None,
        typer.Option(
            help="none, or int8: quantize the layers' weights, on a CPU.", show_default=False
        ),
    ],
    "max_num_seqs": Annotated[
        int | None, typer.Option(help="Requests that generate at a time (64).", show_default=False)
    ],
    "max_batch_tokens": Annotated[
        int | None, typer.Option(help="Tokens in one forward (512).", show_default=False)
    ],
    "max_model_len": Annotated[
        int | None,
        typer.Option(help="Prompt and new tokens together; the model's limit.", show_default=False),
    ],
    "prefix_caching": Annotated[
        bool | None,
        typer.Option(
            "--prefix-caching/--no-prefix-caching",
            help="Compute a prefix that sequences share once (on).",
            show_default=False,
        ),
    ],
    "num_threads": Annotated[
        int | None,
        typer.Option("--threads", help="CPU threads of each engine.", show_default=False),
    ],
    **GENERATION_DEFAULTS,
    "trust_remote_code": Annotated[
        bool | None,
        typer.Option("--trust-remote-code", help="Run Python code that comes with the model."),
    ],
}

worker_engine_options = option_group("engine", _PLACEMENT | _ENGINE)
plan_engine_options = option_group("engine", _ENGINE)
"""`plan` has names of its own for what says where the stages are."""
