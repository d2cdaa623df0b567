"""Put other modules in the place of some of a model's."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

__all__ = ["replace_modules"]


def replace_modules(root: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put `new(module)`, where that is one, in the place of each module below `root`.

    A module that goes by several names is asked for once and replaced under all of them.
    """
    places = _places(root)
    children = list(places)[::-1]
    while children:  # no reference to a child stays behind: its weights go before others come
        replacement = new(children[-1])
        for parent, name in places.pop(children.pop()):
            if replacement is not None:
                setattr(parent, name, replacement)


def _places(root: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Each module below `root`, with its parents and its names there."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in root.modules():
        for name, child in parent._modules.items():  # named_children() tells one name alone
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    return places
