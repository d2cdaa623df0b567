"""How a stage keeps the weights of its layers' linear modules; one notion for all who ask.

A new format is a class here, its name in `config.Quantization` and in `_FORMATS`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from engine.config import Quantization
from engine.models.slicing import find_layers, model_without_weights
from engine.weights.int8 import is_plain_linear, quantize_linears
from engine.weights.layout import lays_out_int8
from queue_api.wire.errors import UnsupportedModelError

__all__ = ["AS_PUBLISHED", "WeightFormat", "weight_format"]

logger = logging.getLogger(__name__)


class WeightFormat(Protocol):
    """What loading, planning and measuring ask of a format."""

    name: Quantization

    def revision(self, published: str | None) -> str | None:
        """Name of the weights: what was begun with one revision isn't resumed with another."""
        ...

    def convert(self, layers: nn.Module, *, lays_out: bool, where: str, model: str) -> None:
        """Convert the weights below `layers`, before anything is computed with them.

        :param lays_out: whether they will be laid out for the CPU's products
        :param where: names the stage in the log
        :param model: names the model's class in an error
        :raises UnsupportedModelError: if there are none that can be converted
        """
        ...

    def small_params(
        self, model_config: Any, *, trust_remote_code: bool = False
    ) -> tuple[int, ...]:
        """How many parameters of each layer take `weight_bytes`; empty if they are as published.

        No weight is read.

        :raises UnsupportedModelError: if the model has none that can be converted
        """
        ...

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """What a product reads of each weight of a linear module in the layers."""
        ...


class _AsPublished:
    name: Quantization = "none"

    def revision(self, published: str | None) -> str | None:
        return published

    def convert(self, layers: nn.Module, *, lays_out: bool, where: str, model: str) -> None:
        pass

    def small_params(
        self,
        model_config: Any,  # noqa: ARG002
        *,
        trust_remote_code: bool = False,  # noqa: ARG002
    ) -> tuple[int, ...]:
        return ()

    def weight_bytes(self, dtype: torch.dtype) -> int:
        return dtype.itemsize


class _Int8:
    name: Quantization = "int8"

    def revision(self, published: str | None) -> str | None:
        return f"{published}+int8"

    def convert(self, layers: nn.Module, *, lays_out: bool, where: str, model: str) -> None:
        total = sum(weight.numel() for weight in layers.parameters())
        # Expanding weights that can't be laid out each time would be slow.
        num_quantized = quantize_linears(layers, in_float32=not lays_out)
        if not num_quantized:
            raise _nothing_to_quantize(model)
        share = num_quantized / total
        saves = lays_out and lays_out_int8()
        logger.log(
            logging.INFO if saves and share > 0.5 else logging.WARNING,
            "%s: %.0f %% of the layers' weights quantized to int8%s",
            *(where, 100 * share),
            "" if saves else ", kept in float32: that saves neither memory nor time here",
        )

    def small_params(
        self, model_config: Any, *, trust_remote_code: bool = False
    ) -> tuple[int, ...]:
        model = model_without_weights(model_config, trust_remote_code=trust_remote_code)
        layers: Iterable[nn.Module] = getattr(*find_layers(model))
        found = tuple(
            sum(linear.weight.numel() for linear in layer.modules() if is_plain_linear(linear))
            for layer in layers
        )
        if not any(found):
            raise _nothing_to_quantize(type(model).__name__)
        return found if lays_out_int8() else ()

    def weight_bytes(self, dtype: torch.dtype) -> int:
        return 1 if lays_out_int8() else dtype.itemsize


AS_PUBLISHED: WeightFormat = _AsPublished()
"""Numbers of the stage's dtype."""

_FORMATS: dict[Quantization, WeightFormat] = {"none": AS_PUBLISHED, "int8": _Int8()}


def weight_format(name: Quantization) -> WeightFormat:
    """The format of that name."""
    return _FORMATS[name]


def _nothing_to_quantize(model: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model} can't be quantized to int8: its layers have no plain nn.Linear; run it with "
        "quantization none"
    )
