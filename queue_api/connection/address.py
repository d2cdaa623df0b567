"""Redis addresses: as they may be shown, and whether they say what was meant."""

from __future__ import annotations

import re

__all__ = ["check_url", "safe_url", "why_unreadable"]

_SECRET = re.compile(r"((?:password|credential)[^=&]*)=[^&]*", re.IGNORECASE)
_MUST_BE_ENCODED = (
    "in a user or password the characters / ? # @ [ ] have to be written %2F %3F %23 %40 %5B %5D"
)
_SAFE_REASONS = "Redis URL must specify", "Invalid value for", "a Sentinel without", "the database"
"""How messages begin that quote nothing a password may be part of."""


def safe_url(url: str) -> str:
    """The URL with its password, and any other secret in its query, replaced by `***`.

    Rather too much is hidden than too little, of one that isn't written as it has to be.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    if "@" in rest and not rest.startswith("/"):
        who, _, where = rest.rpartition("@")
        user, has_password, _ = who.partition(":")
        shown = f"{user}:***@{where}" if has_password else f"{user}@{where}"
    elif "[" in rest:
        shown = rest
    else:
        # what stands for a port may be the password of an address that lost its end
        shown = re.sub(r"^([^/?#]*):(?!\d*(?:[/?#,]|$))[^/?#]*", r"\1:***", rest)
    return scheme + separator + _SECRET.sub(r"\1=***", shown)


def check_url(url: str) -> None:
    """Make sure that no part of a user or password is taken for something else.

    :raises ValueError: it says how to write it
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    path, _, query = rest[len(authority) :].partition("?")
    of_socket = authority == "" or authority.endswith("@")
    is_cut = not of_socket if scheme == "unix" else "@" in path
    if is_cut or "#" in rest or "@" in query.partition("=")[0]:
        raise ValueError(_MUST_BE_ENCODED)


def why_unreadable(error: ValueError) -> str:
    """What was wrong with a URL, without any part of it that may be secret."""
    said = str(error)
    if said == _MUST_BE_ENCODED or said.startswith(_SAFE_REASONS):
        return said
    return "the port isn't a number" if "ort" in said else "it can't be read"
