"""Jinja for templates over rows: nothing out of reach, and every render bounded in steps and size.

A template is compiled with a count in each of its loops, calls and operations, weighted by the size
of what they work on. So the same row fails or renders on every machine, and no clock or thread is
needed to end one that wouldn't.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import StrictUndefined, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

__all__ = ["MOST_CHARS", "Sandbox"]

MOST_STEPS = 1_000_000
"""Well below a second."""
MOST_CHARS = 4 * 2**20
"""Of a text within a template; that of its output is the longest prompt's."""
MOST_ITEMS = 2**20
MOST_BITS = 4096
CHARS_A_STEP = 256
CALL_STEPS = 3

_METHODS = {
    str: "capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower "
    "isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix "
    "replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase "
    "title upper",
    dict: "get items keys values",
    list: "count index",
    tuple: "count index",
    int: "",
    float: "is_integer",
}
_ALLOWED = {kind: frozenset(names.split()) for kind, names in _METHODS.items()}
"""Of the types that rows have, what may be called: nothing whose result a number makes large."""
_WHOLE = (
    *("abs", "capitalize", "dictsort", "e", "escape", "float", "forceescape", "groupby", "indent"),
    *("int", "join", "lower", "max", "min", "replace", "reverse", "round", "safe", "sort"),
    *("string", "striptags", "sum", "title", "tojson", "trim", "truncate", "unique", "upper"),
    "wordcount",
)
"""Filters that look at all of a value, however deep."""
_OUTER = (
    *("count", "d", "default", "first", "items", "last", "length", "list", "map", "reject"),
    *("rejectattr", "select", "selectattr"),
)
"""Those that look at its items alone."""
_SEQUENCE = (str, list, tuple)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template; its steps are counted from `begin` on."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, optimized=False, cache_size=0)
        self._left = MOST_STEPS
        self.globals.pop("lipsum")
        own = {"indent": _indent, "join": self._join, "replace": _replace, "round": _round}
        own |= {"sum": self._sum, "tojson": _tojson}
        self.filters = {
            **{name: self._counted(own.get(name, FILTERS[name]), self._weigh) for name in _WHOLE},
            **{name: self._counted(FILTERS[name], self._count) for name in _OUTER},
            _EACH: self._each,
            _JOINED: self._joined,
            _WEIGHED: self._weigh,
            _WRITTEN: self._written,
        }
        self.tests.pop("in")

    def begin(self) -> None:
        """Count anew."""
        self._left = MOST_STEPS

    def spend(self, steps: int) -> None:
        """:raises SecurityError: there were too many"""
        self._left -= 1 + steps
        if self._left < 0:
            raise SecurityError(f"it takes too long (more than {MOST_STEPS:,} steps)")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _ALLOWED.items():
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Not to be had: a width in it makes a text of any length."""

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(called, "__self__", None)
        self.spend(CALL_STEPS)
        if isinstance(owner, str):
            args = tuple(self._weigh(value) for value in (owner, *args))[1:]
            if called.__name__ == "replace":
                return _replace(owner, *args, **kwargs)
            if called.__name__ == "join":
                return self._join(args[0], owner)
            return self._count(super().call(context, called, *args, **kwargs))
        if isinstance(owner, list | tuple | dict):
            self._weigh(owner)
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        left, right = self._weigh(left), self._weigh(right)
        if operator in ("*", "**"):
            _check_product(operator, left, right)
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("texts aren't formatted with %: join them with ~")
        elif operator == "+" and isinstance(left, _SEQUENCE) and isinstance(right, _SEQUENCE):
            _check_size(left, len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def _counted(self, call: Callable[..., Any], weigh: Callable[[Any], Any]) -> Callable[..., Any]:
        place = 1 if hasattr(call, "jinja_pass_arg") else 0

        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            made = call(*args[:place], *map(weigh, args[place:]), **kwargs)
            return self._count(made) if isinstance(made, list | tuple | dict) else made

        return counted

    def _count(self, value: Any) -> Any:
        """The value, its items counted, at once or as they are taken."""
        if isinstance(value, str):
            self.spend(len(value) // CHARS_A_STEP)
        elif isinstance(value, list | tuple | dict | range):
            self.spend(len(value))
        elif isinstance(value, Iterator):
            return self._each(value)
        return value

    def _weigh(self, value: Any) -> Any:
        """The value, all that is in it counted."""
        if isinstance(value, str):
            self.spend(len(value) // CHARS_A_STEP)
        elif isinstance(value, Mapping):
            self.spend(len(value))
            for inner in value.values():
                self._weigh(inner)
        elif isinstance(value, list | tuple):
            self.spend(len(value))
            for inner in value:
                self._weigh(inner)
        else:
            return self._count(value)
        return value

    def _each(self, values: Any) -> Iterator[Any]:
        if isinstance(values, Undefined):
            iter(values)  # which says what is
        for value in values:
            self.spend(0)
            yield value

    def _joined(self, parts: Sequence[Any]) -> str:
        texts = [str(self._written(part)) for part in parts]
        _check_size("", sum(map(len, texts)))
        return "".join(texts)

    def _join(self, values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        if attribute is not None:
            values = map(make_attrgetter(self, attribute), values)
        texts = [str(self._written(value)) for value in values]
        _check_size("", sum(map(len, texts)) + len(str(d)) * len(texts))
        return str(d).join(texts)

    def _sum(self, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
        if attribute is not None:
            values = map(make_attrgetter(self, attribute), values)
        return sum(values, float(start) if isinstance(start, float) else int(start))

    def _written(self, value: Any, name: str = "") -> Any:
        """What is to be written; what nobody means to isn't."""
        if value is None:
            told = repr(name) if name else "a value"
            raise SecurityError(f"{told} is null: write {{{{ {name or 'it'} or '' }}}} for nothing")
        if callable(value) and not isinstance(value, Undefined):
            raise SecurityError(
                f"{name or 'it'!r} is a function: call it, or write ['…'] for a key"
            )
        if isinstance(value, Iterator):
            raise SecurityError("it would write a generator: put |list or |join behind it")
        if type(value).__module__.startswith("jinja2") and not isinstance(value, Undefined):
            raise SecurityError(f"{name or 'it'!r} is jinja's own; a column's: columns['{name}']")
        return self._weigh(value)


class Counting(NodeTransformer):
    """Puts the count into a template's tree."""

    def __init__(self, environment: Sandbox) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja's name
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, _EACH)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = self._filtered(node.expr, _WEIGHED)
        for operand in node.ops:
            operand.expr = self._filtered(operand.expr, _WEIGHED)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._filtered(node.node, _WEIGHED)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.node, nodes.Name):
            node.node = self._filtered(node.node, _WEIGHED)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        names = [_name_of(part) for part in node.nodes]
        self.generic_visit(node)
        node.nodes = [
            part
            if isinstance(part, nodes.TemplateData) or not isinstance(part, nodes.Expr)
            else self._filtered(part, _WRITTEN, nodes.Const(name, lineno=part.lineno))
            for part, name in zip(node.nodes, names, strict=True)
        ]
        return node

    def _filtered(self, node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
        made = nodes.Filter(node, name, [*args], [], None, None, lineno=node.lineno)
        made.set_environment(self._environment)
        return made


_EACH, _JOINED, _WEIGHED, _WRITTEN = "_each", "_joined", "_weighed", "_written"


def _name_of(node: nodes.Node) -> str:
    """How a variable or a part of one is written; empty for anything else."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getattr) and (front := _name_of(node.node)):
        return f"{front}.{node.attr}"
    return ""


def _check_size(kind: object, size: int) -> None:
    """:raises SecurityError: it would be too large"""
    if size > (MOST_CHARS if isinstance(kind, str) else MOST_ITEMS):
        raise SecurityError(f"it makes a text or list of {size:,}, which is too long")


def _check_product(operator: str, left: Any, right: Any) -> None:
    """:raises SecurityError: it would be too large"""
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            _check_size(value, len(value) * times)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        bits = bits * abs(right) if operator == "**" else bits + right.bit_length()
        if bits > MOST_BITS:
            raise SecurityError(f"it makes a number of {bits:,} bits, which is too large")


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    value, old, new = str(value), str(old), str(new)
    times = value.count(old) if count is None else min(count, value.count(old))
    _check_size("", len(value) + times * max(0, len(new) - len(old)))
    return str.replace(value, old, new, -1 if count is None else count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    front = width if isinstance(width, str) else " " * min(width, MOST_CHARS)
    lines = str(value).splitlines(keepends=True)
    _check_size("", len(str(value)) + len(lines) * len(front))
    return "".join(
        line if (not first and not place) or not (blank or line.strip()) else front + line
        for place, line in enumerate(lines)
    )


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    rounded: float = FILTERS["round"](value, max(-300, min(precision, 300)), method)
    return rounded


def _tojson(value: Any, indent: int | None = None) -> str:
    # jinja's own escapes what would be markup in HTML, which a prompt isn't
    return json.dumps(value, ensure_ascii=False, indent=indent and min(indent, 16))
