"""Words that messages of several places share."""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def counted(count: int, noun: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def without_passwords(url: str) -> str:
    """An address as people may see it."""
    if password := urlsplit(url).password:
        url = url.replace(f":{password}@", ":***@")
    return re.sub(r"(password=)[^&]+", r"\1***", url)
