"""What the routes of batches answer. Types for the page, as in `answers.py`."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from api.openapi.answers import Natural, Said
from pipeline.surface.responses_bodies import Metadata


class BatchError(Said, kw_only=True):
    """What is wrong with a line of the input, counted from 1; null: with the file."""

    code: str
    message: str
    line: Natural | None
    param: str | None


class BatchErrors(Said):
    """The first of what is wrong with the input."""

    object: Literal["list"]
    data: list[BatchError]


class BatchCounts(Said):
    """Requests of a batch; they grow with each part of the results that is kept."""

    total: Natural
    completed: Natural
    failed: Natural


class CachedTokens(Said):
    """Of those of the prompts, they were computed before."""

    cached_tokens: Natural


class ReasoningTokens(Said):
    """They are not told apart."""

    reasoning_tokens: Natural


class BatchUsage(Said):
    """Tokens of what has been answered."""

    input_tokens: Natural
    input_tokens_details: CachedTokens
    output_tokens: Natural
    output_tokens_details: ReasoningTokens
    total_tokens: Natural


class BatchObject(Said, kw_only=True):
    """A batch; what has not happened is left out. `model`: where all of its requests ask the same one."""

    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    created_at: Natural
    request_counts: BatchCounts
    usage: BatchUsage
    errors: BatchErrors | UnsetType = UNSET
    output_file_id: str | UnsetType = UNSET
    error_file_id: str | UnsetType = UNSET
    model: str | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET
    expires_at: Natural | UnsetType = UNSET
    in_progress_at: Natural | UnsetType = UNSET
    finalizing_at: Natural | UnsetType = UNSET
    completed_at: Natural | UnsetType = UNSET
    failed_at: Natural | UnsetType = UNSET
    expired_at: Natural | UnsetType = UNSET
    cancelling_at: Natural | UnsetType = UNSET
    cancelled_at: Natural | UnsetType = UNSET


class Batches(Said):
    """A page of the caller's batches, the newest first; the ids are empty where it is."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str
    last_id: str
    has_more: bool
