"""RowTemplate: a row's columns to a text, by a Jinja template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Template, TemplateSyntaxError, nodes
from jinja2.exceptions import TemplateAssertionError, UndefinedError
from jinja2.meta import find_undeclared_variables

from queue_api.datasets.layout.layout import quoted
from queue_api.datasets.layout.template_sandbox import MOST_CHARS, Counting, Sandbox
from queue_api.wire.errors import ConfigurationError, InvalidRequestError

__all__ = ["RowTemplate"]

ALL = "columns"
"""The name that has all columns, for those whose own name isn't an identifier."""


class RowTemplate:
    """A template, compiled once.

    :param what: what to call it in messages
    :raises ConfigurationError: it isn't one
    """

    def __init__(self, source: str, what: str) -> None:
        self._what = what
        self._sandbox = Sandbox()
        try:
            tree = self._sandbox.parse(source)
            for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
                for part in tree.find_all(kind):
                    raise TemplateAssertionError("it can't use other templates", part.lineno)
            self.names = self._columns(tree)
            """The columns that it names."""
            code = self._sandbox.compile(Counting(self._sandbox).visit(tree), filename=_FILE)
        except TemplateSyntaxError as error:
            lines = source.splitlines()
            shown = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else ""
            raise ConfigurationError(
                f"{what} can't be used: line {error.lineno}, {shown!r:.80}: {error.message}"
            ) from None
        except (RecursionError, SyntaxError, OverflowError, ValueError) as error:
            raise ConfigurationError(f"{what} can't be used: {error}") from None
        self._template = Template.from_code(self._sandbox, code, self._sandbox.globals)

    def render(self, columns: Mapping[str, Any]) -> str:
        """The text for a row.

        :raises InvalidRequestError: a column that it needs isn't there, or it fails on the row;
            says in which line
        """
        self._sandbox.begin()
        context = self._template.new_context({ALL: columns, **columns})
        parts, size = [], 0
        try:
            for part in self._template.root_render_func(context):
                size += len(part)
                if size > MOST_CHARS:
                    raise InvalidRequestError(
                        f"{self._what} makes more than {MOST_CHARS} characters"
                    )
                parts.append(part)
        except InvalidRequestError:
            raise
        except Exception as error:  # a template is a program
            raise self._failed(error, columns) from None
        return "".join(parts)

    def _columns(self, tree: nodes.Template) -> frozenset[str]:
        names = find_undeclared_variables(tree) - self._sandbox.globals.keys()
        if ALL in names:
            names.remove(ALL)
            for item in tree.find_all(nodes.Getitem):
                of, key = item.node, item.arg
                if isinstance(of, nodes.Name) and of.name == ALL and isinstance(key, nodes.Const):
                    names.add(str(key.value))
        return frozenset(names)

    def _failed(self, error: Exception, columns: Mapping[str, Any]) -> InvalidRequestError:
        line, trace = 0, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == _FILE:
                line = self._template.get_corresponding_lineno(trace.tb_lineno)
            trace = trace.tb_next
        what = str(error)[:200] or type(error).__name__
        if isinstance(error, RecursionError):
            what = "it calls itself too often"
        elif isinstance(error, UndefinedError) and not columns.keys() >= self.names:
            what += f"; the row's columns are {quoted(columns) or 'none'}"
        return InvalidRequestError(f"{self._what}, line {line}: {what}")


_FILE = "<the template of a row>"
