"""Who takes part, and with which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BATCHMILL", "CONTESTANTS", "Contestant"]


@dataclass(frozen=True)
class Contestant:
    """An engine with its settings: the best that `--tune` found among `tries`."""

    key: str
    """For the command line."""
    title: str
    """For the table, precision included where it isn't fp32 throughout."""
    module: str
    """In `engines/`."""
    peer: str = "torch"
    """Which `--peer-python` runs it."""
    imports: tuple[str, ...] = ("torch", "transformers")
    distributions: tuple[str, ...] = ("torch", "transformers")
    settings: Mapping[str, Any] = field(default_factory=dict)
    tries: tuple[Mapping[str, Any], ...] = ()
    every: int = 1
    """Runs only each n-th request: one by one takes minutes."""
    converter: str | None = None
    """Which `--peer-python` converts the model; None if the engine reads safetensors."""


BATCHMILL = "batchmill"

CONTESTANTS = (
    Contestant(
        BATCHMILL,
        "batchmill, 1 stage",
        "batchmill",
        imports=("torch", "transformers", "pydantic"),
        settings={"max_num_seqs": 128, "max_batch_tokens": 512},
        tries=tuple(
            {"max_num_seqs": n, "max_batch_tokens": t}
            for n, t in ((64, 256), (64, 512), (128, 256), (128, 512), (128, 1024))
        ),
    ),
    Contestant(
        "batchmill-2",
        "batchmill, 2 stages",
        "batchmill",
        imports=("torch", "transformers", "pydantic"),
        settings={"stages": 2, "max_num_seqs": 128, "max_batch_tokens": 512},
        tries=tuple(
            {"stages": 2, "max_num_seqs": 128, "max_batch_tokens": t, "pipeline": pipeline}
            for pipeline in ("inline", "threads")
            for t in (256, 512, 1024)
        ),
    ),
    Contestant("hf-one", "transformers generate, one by one", "transformers_generate", every=16),
    Contestant(
        "hf-static",
        "transformers generate, static batch",
        "transformers_generate",
        settings={"batch_size": 32},
        tries=tuple({"batch_size": n} for n in (8, 16, 32, 64)),
    ),
    Contestant(
        "hf-batch",
        "transformers generate_batch",
        "transformers_batch",
        settings={"max_batch_tokens": 256, "num_blocks": 512, "page_size": 32},
        tries=tuple(
            {"max_batch_tokens": t, "num_blocks": n, "page_size": 32, "attention": attention}
            for attention in ("sdpa", "eager")
            for t, n in ((128, 128), (256, 256), (256, 512), (512, 1024))
        ),
    ),
    Contestant(
        "openvino",
        "OpenVINO GenAI",
        "openvino",
        peer="openvino",
        imports=("openvino_genai",),
        distributions=("openvino", "openvino-genai"),
        settings={"max_num_batched_tokens": 512, "max_num_seqs": 128, "cache_size": 2},
        tries=tuple(
            {"max_num_batched_tokens": t, "max_num_seqs": n, "cache_size": 2}
            for t, n in ((256, 64), (256, 256), (512, 64), (512, 128), (1024, 128), (4096, 128))
        ),
        converter="openvino-export",
    ),
    Contestant(
        "llamacpp",
        "llama.cpp, f32 weights, f16 cache",
        "llamacpp",
        peer="llamacpp",
        imports=("llama_cpp", "gguf"),
        distributions=("llama-cpp-python", "gguf"),
        settings={"slots": 32, "batch": 512, "cache": "f16"},
        tries=tuple(
            {"slots": n, "batch": t, "cache": cache}
            for cache in ("f16", "f32")
            for n, t in ((32, 512), (64, 512), (128, 512))
        ),
        converter="llamacpp",
    ),
    Contestant(
        "ctranslate2",
        "CTranslate2",
        "ctranslate2",
        peer="ctranslate2",
        imports=("ctranslate2",),
        distributions=("ctranslate2",),
        settings={"batch_size": 16},
        tries=tuple({"batch_size": n} for n in (8, 16, 32)),
        converter="ctranslate2",
    ),
    Contestant(
        "onnxruntime",
        "ONNX Runtime GenAI, static batch",
        "onnxruntime",
        peer="onnxruntime",
        imports=("onnxruntime_genai",),
        distributions=("onnxruntime", "onnxruntime-genai"),
        settings={"batch_size": 16},
        tries=tuple({"batch_size": n} for n in (8, 16, 32)),
        converter="onnxruntime",
    ),
)
