"""Parameters of paths, queries and headers, and the headers of answers."""

from __future__ import annotations

from typing import Any

from api.batches import LISTED as LISTED_BATCHES
from api.batches import MOST_LISTED as MOST_BATCHES
from api.edge import LONGEST_REQUEST_ID
from api.files import MOST_LISTED as MOST_FILES
from api.headers import IDEMPOTENCY_KEY, LINGER, LONGEST_KEY, LONGEST_LINGER_S, READ_TIMEOUT, RESUMABLE, TIMEOUT
from api.openapi.examples import BATCH_ID, FILE_ID, ID
from api.queries import LARGEST
from api.rate_limits import HEADER_NAMES
from api.responses import LISTED, MOST_LISTED
from pipeline.builtin import BUILTIN_MODEL
from pipeline.surface.anthropic_errors import MESSAGES_PATH
from pipeline.surface.event_ids import LAST_EVENT_ID

Parameter = dict[str, Any]

TEXT: dict[str, Any] = {"type": "string"}
FLAG: dict[str, Any] = {"type": "string", "enum": ["false", "true"], "default": "false"}


def _number(least: int, most: int = LARGEST, **more: Any) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most, **more}


def _printable(most: int) -> dict[str, Any]:
    return {"type": "string", "pattern": "^[ -~]+$", "minLength": 1, "maxLength": most}


def _path(name: str, description: str, example: str) -> Parameter:
    examples = {"unknown" if example in (ID, FILE_ID, BATCH_ID) else "known": {"value": example}}
    return {
        "name": name, "in": "path", "required": True, "description": description, "schema": {"type": "string", "minLength": 1},
        "examples": examples,
    }  # fmt: skip


def _query(name: str, schema: dict[str, Any], description: str = "") -> Parameter:
    return {"name": name, "in": "query", "schema": schema, **({"description": description} if description else {})}


def _header(name: str, schema: dict[str, Any], description: str) -> Parameter:
    return {"name": name, "in": "header", "schema": schema, "description": description}


_ID = "The `X-Baton-Request-Id` of an answer, or the `id` in it"
PARAMETERS: dict[str, Parameter] = {
    "request_id": _path("request_id", _ID, ID),
    "response_id": _path("response_id", _ID, ID),
    "file_id": _path("file_id", "The `id` of a file", FILE_ID),
    "batch_id": _path("batch_id", "The `id` of a batch", BATCH_ID),
    "model": _path("model", "Its id", BUILTIN_MODEL),
    "pool": _path("pool", "Its name", BUILTIN_MODEL),
    "stream": _query("stream", FLAG),
    "starting_after": _query(
        "starting_after", _number(0), "The `sequence_number` of the last event that the reader has; with `stream=true`"
    ),
    "order": _query("order", {"type": "string", "enum": ["desc", "asc"], "default": "desc"}),
    "limit": _query("limit", _number(1, MOST_LISTED, default=LISTED)),
    "after": _query("after", TEXT, "The id of the last item that the reader has"),
    "files_limit": _query("limit", _number(1, MOST_FILES, default=MOST_FILES)),
    "files_after": _query(
        "after", {"type": "string", "pattern": "^(file-[0-9a-f]{46})?$"}, "The id of the last file that the reader has, deleted or not"
    ),
    "batches_limit": _query("limit", _number(1, MOST_BATCHES, default=LISTED_BATCHES)),
    "batches_after": _query(
        "after", {"type": "string", "pattern": "^(batch_[0-9a-f]{46})?$"}, "The id of the last batch that the reader has"
    ),
    "purpose": _query("purpose", TEXT, "Files of this purpose only"),
    "Range": _header("Range", TEXT, "`bytes=0-99`, `bytes=100-` or `bytes=-100`; several ranges are answered with the whole"),
    "If-Range": _header("If-Range", TEXT, "The `ETag` of the file; with another the answer is the whole"),
    "last_event_id": _query("last_event_id", TEXT, f"As the header {LAST_EVENT_ID}, which wins"),
    LAST_EVENT_ID: _header(LAST_EVENT_ID, TEXT, "The id of the last event that the reader has: the stream goes on behind it"),
    RESUMABLE: _header(RESUMABLE, FLAG, "A lost connection does not cancel, and a stream's events have ids"),
    LINGER: _header(
        LINGER, {"type": "number", "minimum": 0, "maximum": LONGEST_LINGER_S},
        "Seconds: a lost connection cancels after so long without a reader. Without it: at once, a resumable request never",
    ),
    TIMEOUT: _header(
        TIMEOUT, {"type": "number", "exclusiveMinimum": 0}, "Seconds: the deadline of the request, at most `queue.deadline_s`; then a 504"
    ),
    READ_TIMEOUT: _header(
        READ_TIMEOUT, TEXT,
        "Of the official Python clients, who wait so many seconds for the next byte: the deadline of a whole answer that nobody could "
        "fetch after them",
    ),
    IDEMPOTENCY_KEY: _header(
        IDEMPOTENCY_KEY, _printable(LONGEST_KEY), "The same key and body again read the first request; with another body it is a 409"
    ),
    "X-Request-Id": _header(
        "X-Request-Id", TEXT, f"A label that is echoed and logged: up to {LONGEST_REQUEST_ID} printable ASCII characters, or one is made"
    ),
}  # fmt: skip


def _said(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"schema": schema, "description": description}


HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-Id": _said(TEXT, "The client's label, or one that was made"),
    "request-id": _said(TEXT, f"The same under {MESSAGES_PATH}"),
    "X-Baton-Request-Id": _said(TEXT, "The id of the request behind the answer, once there is one"),
    "x-should-retry": _said(
        {"type": "string", "enum": ["true", "false"]}, "Whether the same request may succeed later"
    ),
    "Retry-After": _said({"type": "integer", "minimum": 1}, "Seconds"),
    "retry-after-ms": _said({"type": "integer", "minimum": 1}, "Milliseconds"),
    "Content-Range": _said(TEXT, "What of the file is in the answer, and its size; with a 416 only the size"),
    "Content-Disposition": _said(TEXT, "The name of the file"),
    "Accept-Ranges": _said({"type": "string", "enum": ["bytes"]}, "A range may be asked for"),
    "ETag": _said(TEXT, "Of the file, whose bytes never change"),
    "WWW-Authenticate": _said({"type": "string", "enum": ["Bearer"]}, "How a key is shown"),
    **{name: _said(TEXT, "Of a limit of the key, where it has one") for name in HEADER_NAMES},
}
