"""What is known of a file."""

from __future__ import annotations

import re

import msgspec

from pipeline.dated import Ids

LONGEST_NAME = 255  # characters of a file's name
NO_NAME = "file"
IDS = Ids("file-")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A file whose bytes are all there. `owner`: as `Request.owner` is; `place`: of its bytes in the store; `expires_s` 0: never."""

    id: str
    owner: str
    purpose: str
    filename: str
    bytes: int
    created_s: int
    expires_s: int = 0
    place: str

    def is_there(self, now_s: float) -> bool:
        """Whether it has not expired; what has is gone for everybody, also before a sweep."""
        return not self.expires_s or self.expires_s > now_s


def clean_name(text: str) -> str:
    """A file's name as it is kept: no folders, nothing that a terminal or a header takes for more than a letter."""
    name = _CONTROL.sub("", re.split(r"[/\\]", text)[-1]).strip()
    return NO_NAME if name in ("", ".", "..") else name[:LONGEST_NAME]
