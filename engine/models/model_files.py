"""The small files of a model's folder: that each can be read and holds what its readers expect.

transformers, tokenizers and Jinja, which read them later, fail in many ways, some much later, and
seldom name the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import _compile_jinja_template

from queue_api.wire.errors import BatchmillError, UnsupportedModelError

__all__ = ["brief", "check_model_files", "diagnose_tokenizer", "read_object"]

_Check = tuple[str, Callable[[Any], bool]]
"""What a field must be, in words, and whether a value is that."""


def _is_id(value: Any) -> bool:
    return type(value) is int


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, dict) and isinstance(value.get("content"), str)
    )


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(
            isinstance(part, dict)
            and isinstance(part.get("name"), str)
            and isinstance(part.get("template"), str)
            for part in value
        )
    return isinstance(value, str)


_ID: _Check = ("a token id", _is_id)
_IDS: _Check = (
    "a token id or a list of them",
    lambda value: _is_id(value) or (isinstance(value, list) and all(map(_is_id, value))),
)
_TOKEN: _Check = ("a token's text or an object with its 'content'", _is_token)
_TOKENS: _Check = (
    "a list of tokens, or an object of them",
    lambda value: isinstance(value, list | dict),
)
_OBJECT: _Check = ("an object", lambda value: isinstance(value, dict))
_STRING: _Check = ("a string", lambda value: isinstance(value, str))

_SPECIAL_TOKENS = {
    **{f"{kind}_token": _TOKEN for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")},
    "additional_special_tokens": _TOKENS,
}
_FIELDS: dict[str, dict[str, _Check]] = {
    "config.json": {
        "model_type": _STRING,
        "eos_token_id": _IDS,
        "bos_token_id": _IDS,
        "pad_token_id": _ID,
        "auto_map": _OBJECT,
        "transformers_weights": _STRING,
    },
    "generation_config.json": {
        "eos_token_id": _IDS,
        "bos_token_id": _IDS,
        "pad_token_id": _ID,
    },
    "tokenizer_config.json": {
        **_SPECIAL_TOKENS,
        "chat_template": ("a template, or a list of named ones", _is_template),
        "added_tokens_decoder": _OBJECT,
        "tokenizer_class": _STRING,
    },
    "special_tokens_map.json": _SPECIAL_TOKENS,
    "added_tokens.json": {},
    "chat_template.json": {"chat_template": ("a template, or a list of named ones", _is_template)},
}
"""Files that hold an object, and what those of its fields are that are read; null is absent."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    :raises UnsupportedModelError: naming the file, if it holds none or can't be read
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UnsupportedModelError(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        size = path.stat().st_size
        what = "is empty" if size == 0 else f"isn't JSON ({brief(error)})"
        raise UnsupportedModelError(f"{path} {what}; it may not have been copied whole") from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{path} holds {_shown(value)}, not an object of fields")
    return value


def check_model_files(folder: Path) -> None:
    """See that each small file that is there is whole, as far as can be told.

    :raises UnsupportedModelError: naming the file and the field
    """
    templates: dict[str, Any] = {}
    for name, fields in _FIELDS.items():
        path = folder / name
        if not path.exists():
            continue
        held = read_object(path)
        for field, (wanted, is_right) in fields.items():
            value = held.get(field)
            if value is not None and not is_right(value):
                raise UnsupportedModelError(f"{path}: {field!r} is {_shown(value)}, not {wanted}")
        templates[name] = held.get("chat_template")
    for path, template in _templates(folder, templates):
        _check_template(path, template)


def _templates(folder: Path, held: dict[str, Any]) -> list[tuple[Path, str]]:
    """All chat templates of the folder, each with the file that it is in."""
    found: list[tuple[Path, str]] = []
    for name, template in held.items():
        if isinstance(template, list):
            found += [(folder / name, part["template"]) for part in template]
        elif template is not None:
            found.append((folder / name, template))
    for path in [*folder.glob("chat_template.jinja"), *folder.glob("*chat_templates/*.jinja")]:
        try:
            found.append((path, path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(f"{path} can't be read: {brief(error)}") from error
    return found


def _check_template(path: Path, template: str) -> None:
    try:
        _compile_jinja_template(template)
    except ImportError:  # no Jinja, or one too old: chats are refused one by one
        return
    except Exception as error:
        line = getattr(error, "lineno", None)
        where = f" in line {line}" if line else ""
        raise UnsupportedModelError(
            f"{path}: the chat template has an error{where}: {brief(error)}"
        ) from error


def diagnose_tokenizer(folder: Path, error: Exception) -> str:
    """Why a tokenizer couldn't be made: the file, if one is damaged by itself, and the reason."""
    path = folder / "tokenizer.json"
    if path.exists():
        from tokenizers import Tokenizer

        try:
            read_object(path)
            Tokenizer.from_file(str(path))
        except UnsupportedModelError as damaged:
            return str(damaged)
        except Exception as damaged:  # tokenizers raises nothing more specific
            return f"{path} isn't a tokenizer: {brief(damaged)}"
    if isinstance(error, BatchmillError):
        return brief(error)
    names = ", ".join(sorted(p.name for p in folder.glob("*token*")))
    return f"{folder}: no tokenizer could be made of {names or 'its files'}: {brief(error)}"


def brief(error: BaseException) -> str:
    """An error's text in one line, cut to what fits a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " …"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + " …"
