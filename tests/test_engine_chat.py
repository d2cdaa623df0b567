"""Chats against transformers' own apply_chat_template, and what a template has no use for."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from kits.engine_models import tiny_tokenizer

from engine.models.tokenizer import Tokenizer
from queue_api.client.submission import as_request
from queue_api.store.jobs import request_json
from queue_api.wire.errors import InvalidRequestError
from queue_api.wire.schemas import GenerationRequest

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RICH = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}"
    "{% if m.name and m.role == 'user' %} {{ m.name }}{% endif %}>"
    "{% if m.content %}{{ m.content }}{% else %}nothing{% endif %}"
    "{% for c in m.tool_calls %}{{ c.function.name }}:"
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if not enable_thinking | default(true) %}<no_think>{% endif %}{% endif %}"
)
USER = {"role": "user", "content": "2 + 3?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@functools.cache
def tokenizer(template: str) -> Any:
    plain = tiny_tokenizer()
    plain.chat_template = template
    return plain


def rendered(template: str, **fields: Any) -> str:
    """The text that the engine makes of a request that was sent."""
    plain = tokenizer(template)
    sent = GenerationRequest.model_validate_json(request_json(as_request(fields, 0)))
    tokens = Tokenizer(plain, frozenset({2}), len(plain)).encode(sent)
    return str(plain.decode(tokens))


def expected(template: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    kwargs = {"add_generation_prompt": True, **kwargs}
    text: str = tokenizer(template).apply_chat_template(messages, tokenize=False, **kwargs)
    return text


@pytest.mark.parametrize("template", [PLAIN, RICH])
def test_nulls_in_a_message_count_as_absent(template: str) -> None:
    nulls = {"refusal": None, "tool_calls": None, "function_call": None, "name": None}
    chat = [USER, {"role": "assistant", "content": "5", "audio": None} | nulls, USER]
    assert rendered(template, messages=chat) == expected(template, chat)


def test_a_last_turn_of_the_assistant_is_continued_on_request() -> None:
    chat = [USER, {"role": "assistant", "content": "It is"}]
    assert rendered(PLAIN, messages=chat) == "<user>2 + 3?\n<assistant>It is\n<assistant>"
    going_on = rendered(PLAIN, messages=chat, continue_final_message=True)
    assert going_on == "<user>2 + 3?\n<assistant>It is"
    assert going_on == expected(
        PLAIN, chat, continue_final_message=True, add_generation_prompt=False
    )


def test_tools_calls_and_answers_go_through_the_template() -> None:
    chat = [
        USER | {"name": "ann"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "add"},
    ]
    text = rendered(RICH, messages=chat, tools=[TOOL])
    assert text == expected(RICH, chat, tools=[TOOL])
    assert "add:a=2" in text
    assert "<assistant>nothing" in text
    # as OpenAI and its client write them
    function = {"name": "add", "arguments": json.dumps({"a": 2})}
    chat[1] = {"role": "assistant", "content": None, "tool_calls": [CALL | {"function": function}]}
    assert rendered(RICH, messages=chat, tools=json.dumps([TOOL])) == text


def test_content_parts_are_for_templates_that_take_them() -> None:
    parts = [{"type": "text", "text": "2 + 3"}, {"type": "text", "text": "= ?"}]
    chat = [{"role": "user", "content": parts}]
    looping = (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endif %}{% endfor %}"
    )
    assert rendered(looping, messages=chat) == expected(looping, chat) == "<user>2 + 3|= ?|"
    dumped = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    cut = "{% for m in messages %}{{ m.content | first }}{% endfor %}"
    for template in (PLAIN, RICH, dumped, cut):
        with pytest.raises(InvalidRequestError, match=r"'messages\[0\].content' as one string"):
            rendered(template, messages=chat)


def test_variables_of_the_template_can_be_set() -> None:
    for value in (True, False):
        text = rendered(RICH, messages=[USER], chat_template_kwargs={"enable_thinking": value})
        assert text == expected(RICH, [USER], enable_thinking=value)
    assert text.endswith("<no_think>")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": [USER | {"name": "ann"}]}, "'messages[0].name'"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, "[1].tool_calls'"),
        ({"messages": [USER | {"reasoning_content": "hm"}]}, "[0].reasoning_content'"),
        ({"messages": [USER], "tools": [TOOL]}, "'tools'"),
        ({"messages": [USER], "chat_template_kwargs": {"enable_thinking": True}}, "thinking'"),
        ({"messages": [USER], "chat_template_kwargs": {"chat_template": "x"}}, "chat_template'"),
        ({"messages": [USER], "chat_template_kwargs": {"tokenize": True}}, "'tokenize'"),
    ],
)
def test_what_the_template_makes_nothing_of_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        rendered(PLAIN, **fields)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "a", "tools": [TOOL]}, "'tools' is for a chat template"),
        ({"prompt": "a", "continue_final_message": True}, "'continue_final_message' is for"),
        ({"messages": [USER], "tools": "[3"}, "isn't JSON"),
        ({"messages": [USER], "tools": [TOOL | {"x": "\ud800"}]}, "can't be written as JSON"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "[0].content' is missing",
        ),
        ({"messages": [USER | {"audio": {"id": "x"}}]}, "unknown field 'messages[0].audio'"),
    ],
)
def test_a_wrong_field_of_a_chat_is_told_before_it_is_sent(
    fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        as_request(fields, 0)
    assert said in str(caught.value)
