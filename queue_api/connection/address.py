"""Redis addresses as they may be shown."""

from __future__ import annotations

import re

__all__ = ["safe_url"]


def safe_url(url: str) -> str:
    """The URL with its password, and any other secret in its query, replaced by `***`."""
    without_password = re.sub(r"(//[^:/@]*):[^/]*@", r"\1:***@", url)
    return re.sub(r"((?:password|credential)[^=&]*)=[^&]*", r"\1=***", without_password)
