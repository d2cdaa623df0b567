"""The limit: a model's matrix products through PyTorch, with nothing around them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.throughput.models import ModelSpec

__all__ = ["measure"]

ROWS = (16, 32, 64, 128, 256, 512)
MEASURED_S = 0.25
Product = Callable[[torch.Tensor], torch.Tensor]


def measure(spec: ModelSpec, num_threads: int) -> list[dict[str, float | int | str]]:
    """Seconds for one pass through all layers and through the head, per kernel and rows.

    Every layer has weights of its own, as in the model: one matrix used again and again would
    stay in the processor's cache.
    """
    torch.set_num_threads(num_threads)
    results: list[dict[str, float | int | str]] = []
    with torch.inference_mode():
        shapes = spec.layer_linears * spec.layers
        layers = [torch.randn(o, i) * 0.02 for i, o in shapes]
        head = [torch.randn(spec.head_linear[::-1]) * 0.02]
        for rows in ROWS:
            for kernel, prepare in _kernels().items():
                layers_s = _pass_s([prepare(w, rows) for w in layers], layers, rows)
                head_s = _pass_s([prepare(w, rows) for w in head], head, rows)
                results.append(
                    {
                        "kernel": kernel,
                        "rows": rows,
                        "layers_s": layers_s,
                        "head_s": head_s,
                        "layers_gflops": spec.flops(rows, 0) / layers_s / 1e9,
                        "head_gflops": spec.flops(0, rows) / head_s / 1e9,
                    }
                )
    return results


def _kernels() -> dict[str, Callable[[torch.Tensor, int], Product]]:
    """Ways to multiply by a weight; laying it out is paid at load, so it isn't timed."""
    kernels: dict[str, Callable[[torch.Tensor, int], Product]] = {
        "linear": lambda w, _: lambda x: torch.nn.functional.linear(x, w)
    }
    if torch.backends.mkldnn.is_available():
        kernels["laid out for oneDNN"] = _onednn
    if torch.backends.mkl.is_available():
        kernels["laid out for MKL"] = _mkl
    return kernels


def _onednn(weight: torch.Tensor, rows: int) -> Product:
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, laid_out, None, "none", [], "")


def _mkl(weight: torch.Tensor, rows: int) -> Product:
    laid_out = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkl._mkl_linear(x, laid_out, weight, None, rows)


def _pass_s(products: list[Product], weights: list[torch.Tensor], rows: int) -> float:
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in weights}
    times: list[float] = []
    ends = time.perf_counter() + MEASURED_S
    while len(times) < 4 or time.perf_counter() < ends:
        started = time.perf_counter()
        for product, weight in zip(products, weights, strict=True):
            product(inputs[weight.shape[1]])
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first pass warms up
