"""`panel_product.c`, called with checked arguments."""

from __future__ import annotations

import ctypes
import functools

import torch

from engine.kernels.native_library import native_library

__all__ = ["PanelProduct", "panel_product"]


class PanelProduct:
    """Products with weights laid out in panels, on a CPU in float32."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.panel_width.restype = size
        self._panel_width: int = library.panel_width()
        self._make_panels = library.make_panels
        self._make_panels.argtypes = (pointer, size, size, pointer, threads)
        self._multiply = library.multiply
        self._make_int8_panels = library.make_int8_panels
        self._make_int8_panels.argtypes = self._make_panels.argtypes
        self._multiply.argtypes = (
            *(pointer, size, pointer, pointer, pointer, pointer),
            *(size, size, threads),
        )
        for function in (self._make_panels, self._make_int8_panels, self._multiply):
            function.restype = None

    def lay_out(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [outputs, inputs], float32 or int8, laid out: [panels, inputs, panel width].

        :raises ValueError: if it is neither
        """
        if weight.dtype not in {torch.float32, torch.int8}:
            raise ValueError(f"no layout of {weight.dtype} weights")
        outputs, inputs = weight.shape
        weight = weight.contiguous()
        panels = weight.new_empty(-(-outputs // self._panel_width), inputs, self._panel_width)
        threads = torch.get_num_threads()
        make = self._make_int8_panels if weight.dtype == torch.int8 else self._make_panels
        make(weight.data_ptr(), outputs, inputs, panels.data_ptr(), threads)
        return panels

    def __call__(
        self,
        x: torch.Tensor,
        panels: torch.Tensor,
        bias: torch.Tensor | None,
        outputs: int,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x` [..., inputs] times the weight that `panels` was made of, and `bias` [outputs].

        :param scales: [outputs] that the rows of an int8 weight are multiplied with
        :returns: [..., outputs]; each row's numbers are the same whatever rows are beside it
        :raises ValueError: if the tensors don't fit each other
        """
        inputs = x.shape[-1]
        shape = -(-outputs // self._panel_width), inputs, self._panel_width
        dtype = torch.float32 if scales is None else torch.int8
        if (
            not outputs
            or x.dtype != torch.float32
            or panels.shape != shape
            or panels.dtype != dtype
        ):
            parts = f"{tuple(x.shape)} {x.dtype} by {tuple(panels.shape)} {panels.dtype}"
            raise ValueError(f"no product of {parts} to {outputs}")
        for name, vector in (("a bias", bias), ("scales", scales)):
            if vector is not None and not _is_plain(vector, outputs):
                found = f"{name} of shape {tuple(vector.shape)} {vector.dtype}"
                raise ValueError(f"{found} for {outputs} outputs")
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], outputs)
        self._multiply(
            *(x.data_ptr(), x.numel() // inputs, panels.data_ptr()),
            *(_pointer(scales), _pointer(bias), out.data_ptr()),
            *(inputs, outputs, torch.get_num_threads()),
        )
        return out


def _is_plain(vector: torch.Tensor, size: int) -> bool:
    return vector.shape == (size,) and vector.dtype == torch.float32 and vector.is_contiguous()


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def panel_product() -> PanelProduct | None:
    """The native functions; None where they can't be had."""
    library = native_library("panel_product")
    return None if library is None else PanelProduct(library)
