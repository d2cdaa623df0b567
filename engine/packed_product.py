"""`packed_product.c`, called with checked arguments."""

from __future__ import annotations

import ctypes
import functools

import torch

from engine.native_library import native_library

__all__ = ["PackedProduct", "packed_product"]


class PackedProduct:
    """Products with weights laid out in panels, on a CPU in float32."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.panel_width.restype = size
        self._panel_width: int = library.panel_width()
        self._pack = library.pack_panels
        self._pack.argtypes = (pointer, size, size, pointer, threads)
        self._multiply = library.multiply
        self._multiply.argtypes = (
            *(pointer, size, pointer, pointer, pointer),
            *(size, size, threads),
        )
        for function in (self._pack, self._multiply):
            function.restype = None

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [outputs, inputs] float32 laid out: [panels, inputs, panel width]."""
        outputs, inputs = weight.shape
        weight = weight.contiguous()
        packed = weight.new_empty(-(-outputs // self._panel_width), inputs, self._panel_width)
        threads = torch.get_num_threads()
        self._pack(weight.data_ptr(), outputs, inputs, packed.data_ptr(), threads)
        return packed

    def __call__(
        self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, outputs: int
    ) -> torch.Tensor:
        """`x` [..., inputs] times the weight that `packed` was made of, and `bias` [outputs].

        :returns: [..., outputs]; each row's numbers are the same whatever rows are beside it
        :raises ValueError: if the tensors don't fit each other
        """
        inputs = x.shape[-1]
        panels = -(-outputs // self._panel_width)
        if x.dtype != torch.float32 or packed.shape != (panels, inputs, self._panel_width):
            shapes = f"{tuple(x.shape)} {x.dtype} by {tuple(packed.shape)} to {outputs}"
            raise ValueError(f"no product of {shapes}")
        if bias is not None and (bias.shape != (outputs,) or not bias.is_contiguous()):
            raise ValueError(f"a bias of shape {tuple(bias.shape)} for {outputs} outputs")
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], outputs)
        self._multiply(
            *(x.data_ptr(), x.numel() // inputs, packed.data_ptr()),
            *(None if bias is None else bias.data_ptr(), out.data_ptr()),
            *(inputs, outputs, torch.get_num_threads()),
        )
        return out


@functools.cache
def packed_product() -> PackedProduct | None:
    """The compiled functions; None where they can't be had."""
    library = native_library("packed_product")
    return None if library is None else PackedProduct(library)
