"""Prompts from templates: rendered as Jinja does, strict, and bounded whatever they say."""

from __future__ import annotations

import json
import string
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from kits.layout_kit import look, parse, parser, request, turns, wrong

from queue_api.datasets.formats.json_record import JsonRecordReader
from queue_api.datasets.layout.template import RowTemplate
from queue_api.wire.errors import ConfigurationError, InvalidRequestError

ROW = {
    "question": "What is 2 + 3?",
    "context": None,
    "choices": ["four", "five"],
    "meta": {"source": "school", "items": 3},
    "level": 2,
    "two words": "yes",
}


def render(source: str, **columns: Any) -> str:
    return RowTemplate(source, "the template").render(columns)


def failure(source: str, **columns: Any) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        render(source, **columns)
    return str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "Q: {{ question }}\nA:",
        "{{ question|upper|trim }} {{ question.upper() }} {{ question[:4] ~ '…' ~ level }}",
        "{% for c in choices %}{{ loop.index }}/{{ loop.length }} {{ c }}{% if not loop.last %}, "
        "{% endif %}{% endfor %}",
        "{% for k, v in meta.items() %}{{ k }}={{ v }};{% endfor %}{{ meta.source }}",
        "{% if context %}{{ context }}{% else %}none{% endif %}{{ context or '' }}",
        "{{ meta['items'] + level * 2 - 7 // 2 }} {{ 2 ** level }} {{ level % 2 }} {{ -level }}",
        "{{ choices|join(' or ') }} {{ choices|map('upper')|list }} {{ choices|length }}",
        "{{ nothing is defined }} {{ nothing|default('d') }} {{ question is string }}",
        "{{ 'five' in choices }} {{ level > 1 and level <= 2 }} {{ level == 2 }}",
        "{% set ns = namespace(n=0) %}{% for c in choices %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}",
        "{% macro ask(q, n=1) %}{{ q }}{{ n }}{% endmacro %}{{ ask(question) }}{{ ask('a', n=2) }}",
        "{% set text %}({{ question }}){% endset %}{{ text }}{% filter upper %}a{% endfilter %}",
        "{{ question.replace('2', 'two').split('+')|last }} {{ question|replace('What', 'Who') }}",
        "{{ 'a\nb'|indent(2) }} {{ 2.345|round(1) }} {{ [1, 2]|sum }} {{ choices|sort|first }}",
        "{{ [meta]|map(attribute='source')|join }} {{ [meta]|sum('items') }}",
        "{{ ', '.join(choices) }}",
        "{{ choices|select('string')|list }} {{ 'a' if false else 'x' * 3 }} {# a comment #}",
        "a\n{%- if level -%}\n  b\n{%- endif %}\n",
    ],
)
def test_templates_render_as_jinja_does(source: str) -> None:
    assert render(source, **ROW) == Environment().from_string(source).render(ROW)


@settings(deadline=None)
@given(st.text(alphabet=string.printable.replace("{", ""), max_size=40), st.text(max_size=40))
def test_any_text_is_written_as_it_is(front: str, value: str) -> None:
    front = front.replace("\r\n", "\n").replace("\r", "\n")
    assert render(front + "{{ value }}.", value=value) == f"{front}{value}."


def test_json_in_a_prompt_is_json_and_not_html() -> None:
    assert render("{{ m|tojson }}", m={"é": "<a> & 'b'"}) == '{"é": "<a> & \'b\'"}'
    assert json.loads(render("{{ m|tojson(indent=2) }}", m={"a": [1]})) == {"a": [1]}


def test_all_columns_are_there_by_any_name() -> None:
    assert render("{{ columns['two words'] }} {{ columns|length }}", **ROW) == "yes 6"
    assert render("{{ columns }}", columns="mine") == "mine"
    names = RowTemplate("{{ a }}{% set b = c %}{{ b }}{{ columns['d e'] }}{{ range(2) }}", "").names
    assert names == {"a", "c", "d e"}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("a\n{{ qestion }}", "the template, line 2: 'qestion' is undefined; the row's columns are"),
        ("{{ meta.sorce }}", "has no attribute 'sorce'"),
        ("{% if nothing %}{% endif %}", "'nothing' is undefined"),
        ("{% for c in nothing %}{% endfor %}", "'nothing' is undefined"),
        ("{{ nothing ~ 'a' }}", "'nothing' is undefined"),
        ("{{ context }}", "'context' is null: write {{ context or '' }} for nothing"),
        ("{{ 'a' ~ context }}", "is null"),
        ("{{ [context]|join }}", "is null"),
        ("{{ meta.items }}", "'meta.items' is a function"),
        ("{{ choices|map('upper') }}", "put |list or |join behind it"),
        ("{{ self }}", "jinja's own"),
        ("\n\n{{ 1 // 0 }}", "line 3: integer division or modulo by zero"),
        ("{{ question + 1 }}", "line 1: can only concatenate str"),
        ("{{ question.__class__ }}", "unsafe"),
        ("{{ range.__globals__ }}", "unsafe"),
        ("{% do choices.append(1) %}", "unsafe"),
        ("{{ choices.append('x') }}", "unsafe"),
        ("{{ '%d' % 3 }}", "join them with ~"),
        ("{{ '{}'.format(3) }}", "unsafe"),
    ],
)
def test_a_row_that_a_template_fails_on_says_where_and_why(source: str, told: str) -> None:
    if "{% do" in source:
        with pytest.raises(ConfigurationError, match="line 1"):
            RowTemplate(source, "the template")
    else:
        assert told in failure(source, **ROW)


ENDLESS = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in [[]] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "{% set ns = namespace(a='a') %}{% for i in range(99) %}"
    "{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "{% set ns = namespace(a='a') %}{% for i in range(99) %}"
    "{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "{% set ns = namespace(a=[1]) %}{% for i in range(99) %}"
    "{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% endfor %}{{ ns.a|tojson }}",
    "{% set ns = namespace(a='a') %}{% for i in range(60) %}"
    "{% set ns.a = ns.a.replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 * 'abc' * 10 ** 10 }}",
    "{{ [1] * 10 ** 10 }}",
    "{{ 7 ** (10 ** 10) }}",
    "{{ 'a'|indent(10 ** 12, first=true) }}",
    "{{ 'abc'|replace('', 'x' * 4000000) }}",
    "{{ ('x' * 4000).join(['a'] * 100000) }}",
    "{{ ['a'] * 100000|join('x' * 4000) }}",
    "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% for i in range(100000) %}{% set a = range(100000)|map('string')|join %}{% endfor %}",
    "{% for i in range(100000) %}{% set a = range(100000)|select('odd')|list %}{% endfor %}",
    "{% set a = 'x' * 4000000 %}{% for i in range(100000) %}{{ 'y' in a }}{% endfor %}",
    "{% set a = 'x' * 4000000 %}{% for i in range(100000) %}{% set b = a[1:] %}{% endfor %}",
    "{% set a = 'x' * 4000000 %}{% for i in range(100000) %}{% set b = a|upper %}{% endfor %}",
    "{% set a = 'x' * 4000000 %}{% for i in range(100000) %}{% set b = a.count('y') %}{% endfor %}",
    "{% set a = 'x' * 4000000 %}{% set b = a.split('x') %}{% set c = a.split('x') %}",
    "{% set a = 'x' * 4000000 %}{% set b = a|list %}{% set c = a|list %}",
    "{{ 1|round(10 ** 10, 'ceil') * 10 ** 5000 }}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_without_end_fails_its_row_and_the_next_one_renders(source: str) -> None:
    threads = threading.active_count()
    template = RowTemplate("{{ fine }}" + "{% if not fine %}" + source + "{% endif %}", "it")
    with pytest.raises(InvalidRequestError, match=r"line 1|makes more than"):
        template.render({"fine": ""})
    assert template.render({"fine": "yes"}) == "yes"
    assert threading.active_count() == threads


def test_long_texts_and_lists_of_honest_rows_have_room() -> None:
    text = "word " * 200_000
    assert render("{{ text|trim }}\n{{ text[:100] }}", text=text).startswith(text[:-1])
    turns = [{"role": "user", "content": "some words " * 20}] * 2000
    source = "{% for t in turns %}{{ t.role|upper }}: {{ t.content|trim }}\n{% endfor %}"
    assert render(source, turns=turns).count("USER") == 2000


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("a\n{{ b c }}", r"line 2, '\{\{ b c \}\}'"),
        ("{% if a %}", "line 1"),
        ("{{ a|nofilter }}", "No filter named 'nofilter'"),
        ("{{ 'a'|center(9) }}", "No filter named 'center'"),
        ("{% include 'x' %}", "it can't use other templates"),
        ("\n{% extends 'x' %}", "line 2.*other templates"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "can't be used"),
    ],
)
def test_what_is_no_template_is_refused_before_any_row(source: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        parser(template=source)
    with pytest.raises(ConfigurationError, match=told):
        parser(system=source)


def test_a_template_makes_the_prompt_and_the_row_comes_back_whole() -> None:
    columns = {"q": "What?", "prompt": "label", "max_tokens": 3}
    rows = parse(columns, {"q": ""}, {"x": 1}, template="{{ q }}")
    assert request(rows[0]).prompt == "What?"
    assert request(rows[0]).sampling.max_tokens == 3
    assert dict(rows[0].columns) == columns
    assert "line 2: the template makes an empty prompt of the row" in wrong(rows[1])
    assert "line 3: the template, line 1: 'q' is undefined; the row's columns are 'x'" in wrong(
        rows[2]
    )


def test_a_prompt_becomes_a_chat_where_that_is_asked_for() -> None:
    chat = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]
    rows = parse({"q": "What?"}, {"q": ""}, {"q": "Who?"}, prompt_column="q", chat=True)
    assert turns(rows[0]) == [("user", "What?")]
    assert "column 'q' is empty: the row has no prompt" in wrong(rows[1])
    rows = parse({"messages": chat}, {"prompt": [5]}, {"prompt": "Hi"}, chat=True)
    assert turns(rows[0]) == [("system", "Own."), ("user", "Hi")]
    assert "a prompt of token ids can't be a chat" in wrong(rows[1])
    assert turns(rows[2]) == [("user", "Hi")]


def test_a_system_turn_stands_before_prompts_and_chats_without_one() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    own = [{"role": "system", "content": "Own."}, *chat]
    rows = parse(
        {"prompt": "Hi", "tone": "kind"},
        {"messages": chat, "tone": "kind"},
        {"messages": own, "tone": "kind"},
        {"prompt": "Hi", "tone": ""},
        {"prompt": [5], "tone": "kind"},
        {"prompt": "", "tone": "kind"},
        {"prompt": "Hi"},
        {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": chat}, "tone": "k"},
        system="{% if tone %}Be {{ tone }}.{% endif %}",
    )
    assert turns(rows[0]) == turns(rows[1]) == [("system", "Be kind."), ("user", "Hi")]
    assert turns(rows[2]) == [("system", "Own."), ("user", "Hi")]
    assert request(rows[3]).prompt == "Hi"
    assert "a prompt of token ids can't be a chat" in wrong(rows[4])
    assert "'prompt' is empty" in wrong(rows[5])
    assert "the system template, line 1: 'tone' is undefined" in wrong(rows[6])
    assert turns(rows[7]) == [("system", "Be k."), ("user", "Hi")]
    (row,) = parse({"q": "Hi"}, template="{{ q }}!", system="Be brief.")
    assert turns(row) == [("system", "Be brief."), ("user", "Hi!")]


def fingerprint(columns: dict[str, Any], **options: Any) -> str:
    record = JsonRecordReader().read(json.dumps(columns).encode())
    return parser(**options).fingerprint(record)


def test_another_rendering_is_another_row_and_the_same_one_is_the_same() -> None:
    columns = {"a": "1", "b": ""}
    first = fingerprint(columns, template="Q: {{ a }}")
    assert first == fingerprint(columns, template="Q:{{ ' ' }}{{ a }}{{ b }}")
    assert first == fingerprint(columns, template="Q: {{ a }}", system="{{ b }}")
    others = [
        fingerprint(columns, template="Q:  {{ a }}"),
        fingerprint(columns, template="Q: {{ a }}", system="s"),
        fingerprint({**columns, "b": "x"}, template="Q: {{ a }}"),
        fingerprint(columns, template="{{ nothing }}"),
        fingerprint(columns, template="{{ nothing_else }}"),
    ]
    assert len({first, *others}) == 1 + len(others)
    # plain columns, with the system's turn or without
    plain = {"prompt": "a"}
    assert fingerprint(plain) != fingerprint(plain, system="s")


def test_a_column_that_no_row_has_is_told_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"question": "a", "x": "b"}\n' * 3000)
    told = "no column 'qestion', named for a template (did you mean 'question'?); their columns"
    assert told in look(path, template="{{ qestion }}")[1]
    assert told in look(path, prompt_column="x", system="{{ qestion }}")[1]
    how_read, _ = look(path, template="{{ x }}{{ note|default('') }}")
    assert how_read == "prompt from the template, of the columns 'note', 'x'"
    assert "line 1: the template, line 1: division by zero" in look(path, template="{{ 1/0 }}")[1]


def test_columns_that_an_option_reads_are_told_of_with_it() -> None:
    told: list[str] = []
    row = {"prompt": "a", "system": "b", "conversations": "c"}
    parse(row, warn=told.append)
    assert any("--system '{{ system }}' sends it" in line for line in told)
    assert any("--messages-column conversations reads it" in line for line in told)
    told.clear()
    parse(row, warn=told.append, template="{{ prompt }}{{ conversations }}", system="{{ system }}")
    assert not told
    parse({"a": "b", "messages": 1, "body": 2, "inputs": 3}, warn=told.append, prompt_column="a")
    assert not told
