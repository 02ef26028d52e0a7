"""What is known of a batch, and which state may follow which."""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.dated import Ids

VALIDATING, FAILED, IN_PROGRESS, FINALIZING = "validating", "failed", "in_progress", "finalizing"
COMPLETED, EXPIRED, CANCELLING, CANCELLED = "completed", "expired", "cancelling", "cancelled"

ENDED = (COMPLETED, FAILED, EXPIRED, CANCELLED)

# Finalizing leads to three ends: what was in the way of the last lines says which.
FOLLOWS: dict[str, tuple[str, ...]] = {
    VALIDATING: (IN_PROGRESS, FAILED, CANCELLING, EXPIRED),
    IN_PROGRESS: (FINALIZING, CANCELLING, FAILED),
    FINALIZING: (COMPLETED, EXPIRED, FAILED),
    CANCELLING: (CANCELLED, FAILED),
}

IDS = Ids("batch_")


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with a line of the input, counted from 1; None: with the file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A batch. Times in s since 1970, 0 for what has not happened; `deadline_s`: what has not run by then never will. Counts and tokens
    grow with each part that is kept; `answered` and `answered_failed` are what its worker said last, kept or not. `models`: those that
    its owner may use, with spaces between them; empty for all. The numbers of its lines, blank ones too, are below `lines`."""

    id: str
    owner: str
    state: str
    endpoint: str
    input_file_id: str
    window: str
    created_s: int
    deadline_s: int
    models: str = ""
    metadata: str = ""  # JSON, as it was given
    output_life_s: int = 0  # of its output files; 0: as files live that do not say
    epoch: int = 0  # raised each time somebody takes it up

    model: str = ""  # empty where there are several
    lines: int = 0
    total: int = 0
    completed: int = 0
    failed: int = 0
    answered: int = 0
    answered_failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    errors: str = ""  # JSON list of `LineError`
    output_file_id: str = ""
    error_file_id: str = ""

    in_progress_s: int = 0
    finalizing_s: int = 0
    completed_s: int = 0
    failed_s: int = 0
    expired_s: int = 0
    cancelling_s: int = 0
    cancelled_s: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ENDED

    @property
    def counts(self) -> dict[str, int]:
        """Requests in all, and how many have succeeded and failed. While it runs an answer counts that is not kept yet."""
        completed, failed = self.completed, self.failed
        if not self.has_ended:
            completed, failed = max(completed, self.answered), max(failed, self.answered_failed)
        return {"total": self.total, "completed": completed, "failed": failed}

    def may_become(self, state: str) -> bool:
        """Whether a state may follow the one that it is in."""
        return state in FOLLOWS.get(self.state, ())


def shown(record: BatchRecord) -> dict[str, Any]:
    """A batch as OpenAI's clients know it; what has not happened is not there, nor are files that may still be made anew."""
    times = {
        f"{name}_at": getattr(record, f"{name}_s") or None
        for name in (IN_PROGRESS, FINALIZING, COMPLETED, FAILED, EXPIRED, CANCELLING, CANCELLED)
    }
    errors = msgspec.json.decode(record.errors) if record.errors else []
    optional = {
        "errors": {"object": "list", "data": errors} if errors else None,
        "output_file_id": (record.has_ended and record.output_file_id) or None,
        "error_file_id": (record.has_ended and record.error_file_id) or None,
        "model": record.model or None,
        "metadata": msgspec.json.decode(record.metadata) if record.metadata else None,
        "expires_at": record.deadline_s,
        **times,
    }
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "input_file_id": record.input_file_id,
        "completion_window": record.window,
        "status": record.state,
        "created_at": record.created_s,
        "request_counts": record.counts,
        "usage": {
            "input_tokens": record.prompt_tokens,
            "input_tokens_details": {"cached_tokens": record.cached_tokens},
            "output_tokens": record.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": record.prompt_tokens + record.completion_tokens,
        },
        **{name: value for name, value in optional.items() if value is not None},
    }
