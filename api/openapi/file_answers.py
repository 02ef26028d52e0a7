"""What the routes of files answer. Types for the page, as in `answers.py`."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from api.openapi.answers import Natural, Said


class FileObject(Said, kw_only=True):
    """A file; `expires_at` where it expires."""

    id: str
    object: Literal["file"]
    bytes: Natural
    created_at: Natural
    expires_at: Natural | UnsetType = UNSET
    filename: str
    purpose: str
    status: Literal["processed"]


class Files(Said):
    """A page of the caller's files; the ids are empty where it is."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str
    last_id: str
    has_more: bool


class DeletedFile(Said):
    """It is gone, and its bytes are."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]
