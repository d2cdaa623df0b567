"""Tensors from device to device, without waiting where that is safe."""

from __future__ import annotations

import torch

__all__ = ["moved"]


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; itself if it is there.

    To CUDA nothing waits: from the CPU the copy is made out of pinned memory, which torch keeps
    until it is done, and what follows on the device follows in its stream.
    """
    if tensor.device == device:
        return tensor
    if device.type != "cuda":
        # Told not to wait, torch would return memory that the device has yet to write.
        return tensor.to(device)
    if tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
