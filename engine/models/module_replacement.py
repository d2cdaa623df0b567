"""Put other modules in the place of some of a model's."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

__all__ = ["replace_modules"]


def replace_modules(root: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put `new(module)`, where that is one, in the place of each module below `root`.

    A module that goes by several names is asked for once and replaced under all of them.
    """
    asked: dict[nn.Module, nn.Module | None] = {}
    for module in list(root.modules()):
        for name, child in list(module._modules.items()):  # named_children() tells one name alone
            if child is None:
                continue
            if child not in asked:
                asked[child] = new(child)
            if (replacement := asked[child]) is not None:
                setattr(module, name, replacement)
