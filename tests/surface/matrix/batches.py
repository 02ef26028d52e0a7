"""Batches: made, listed, read, cancelled. Nobody runs them here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from openai.types import Batch
from pydantic import BaseModel

from tests.openai_types import strictly
from tests.surface.matrix import files
from tests.surface.matrix.case import Answer, Case

PATH = "/v1/batches"
ONE, CANCEL = PATH + "/{id}", PATH + "/{id}/cancel"
BODY: dict[str, Any] = {"input_file_id": "{id}", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
LIFE = {"anchor": "created_at", "seconds": 3600}
INPUT, MADE = "batch/input/made", "batch/plain/made"
UNKNOWN = "batch_" + "0" * 46
SECONDS = {"24h": 86_400, "1h": 3600, "90m": 5400, "30d": 2_592_000, "45s": 45}


class Batches(BaseModel):
    """The page that OpenAI's client reads; its own type is bound to the client."""

    object: str
    data: list[Batch]
    first_id: str
    last_id: str
    has_more: bool


def check(answer: Answer) -> None:
    """One that was made."""
    made = strictly(Batch, answer.json)
    asked = answer.case.asked
    assert (made.status, made.input_file_id, made.endpoint) == ("validating", answer.before.id, asked["endpoint"])
    assert made.completion_window == asked["completion_window"]
    assert made.expires_at is not None
    assert made.expires_at - made.created_at == SECONDS[made.completion_window]
    assert made.metadata == asked.get("metadata")
    assert made.request_counts is not None
    assert made.request_counts.total == 0


def check_same(answer: Answer) -> None:
    assert strictly(Batch, answer.json).model_dump() == strictly(Batch, answer.before.json).model_dump()


def check_cancelled(answer: Answer) -> None:
    batch = strictly(Batch, answer.json)
    assert (batch.id, batch.status) == (answer.before.id, "cancelled")  # no worker has begun it
    assert batch.cancelling_at is not None and batch.cancelled_at is not None


def check_page(answer: Answer) -> None:
    page = strictly(Batches, answer.json)
    ids = [one.id for one in page.data]
    assert ids == sorted(ids, reverse=True)
    assert (page.first_id, page.last_id) == ((ids[0], ids[-1]) if ids else ("", ""))
    assert len(ids) <= int(answer.case.params.get("limit", 20))
    if after := answer.case.params.get("after"):
        assert all(one < after for one in ids)


def is_the_keyed_one(answer: Answer) -> None:
    assert answer.id == answer.others["batch/keyed/made"].id


def check_wrong(answer: Answer) -> None:
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == WRONG_CODES[answer.case.id]
    if error["param"] == "input_file_id":
        assert error["message"].startswith("input_file_id: ")


PAGES: dict[str, Mapping[str, str]] = {
    "all": {},
    "one": {"limit": "1"},
    "most": {"limit": "100"},
    "behind-the-newest": {"after": "batch_" + "f" * 46},
    "end": {"after": UNKNOWN},
}
ROWS: dict[str, dict[str, Any]] = {
    **{f"endpoint-{path.removeprefix('/v1/').replace('/', '-')}": {"endpoint": path} for path in (
        "/v1/completions", "/v1/embeddings", "/v1/responses")},
    **{f"window-{window}": {"completion_window": window} for window in SECONDS if window != "24h"},
    "metadata": {"metadata": {"of": "tests", "empty": ""}},
    "life": {"output_expires_after": LIFE},
    "nulls": {"metadata": None, "output_expires_after": None},
    "unknown-field": {"more": 1},
}  # fmt: skip
_UNKNOWN_FILE = BODY | {"input_file_id": files.UNKNOWN}
_GET: dict[str, Any] = {"path": ONE, "method": "GET"}
WRONG: list[tuple[str, int, tuple[str, str | None], dict[str, Any]]] = [
    ("no-such-file", 400, ("invalid_request", "input_file_id"), {"body": _UNKNOWN_FILE}),
    ("no-id-of-a-file", 400, ("invalid_request", "input_file_id"), {"body": BODY | {"input_file_id": "x"}}),
    ("file-of-another-key", 400, ("invalid_request", "input_file_id"), {"body": BODY, "after": INPUT, "key": "other-models"}),
    ("no-file", 400, ("invalid_request", "input_file_id"), {"body": {name: BODY[name] for name in ("endpoint", "completion_window")}}),
    ("no-endpoint", 400, ("invalid_request", "endpoint"), {"body": {name: BODY[name] for name in ("input_file_id", "completion_window")}}),
    ("no-window", 400, ("invalid_request", "completion_window"), {"body": {name: BODY[name] for name in ("input_file_id", "endpoint")}}),
    *((f"endpoint-{number}", 400, ("invalid_request", "endpoint"), {"body": _UNKNOWN_FILE | {"endpoint": endpoint}})
        for number, endpoint in enumerate(("/v1/messages", "/v1/chat/completions/", "chat", 1))),
    *((f"window-{window}", 400, ("invalid_request", "completion_window"), {"body": _UNKNOWN_FILE | {"completion_window": window}})
        for window in ("31d", "0h", "24", "h", "1w", "1h ", "721h")),
    ("metadata-text", 400, ("invalid_request", "metadata"), {"body": _UNKNOWN_FILE | {"metadata": "x"}}),
    ("metadata-17", 400, ("invalid_request", "metadata"), {"body": _UNKNOWN_FILE | {"metadata": {str(n): "x" for n in range(17)}}}),
    ("life-short", 400, ("invalid_request", "output_expires_after.seconds"), {
        "body": _UNKNOWN_FILE | {"output_expires_after": LIFE | {"seconds": 3599}}}),
    ("life-anchor", 400, ("invalid_request", "output_expires_after.anchor"), {
        "body": _UNKNOWN_FILE | {"output_expires_after": LIFE | {"anchor": "completed_at"}}}),
    ("torn", 400, ("invalid_request", None), {"body": b'{"input_file_id": '}),
    ("no-json", 415, ("unsupported_media_type", None), {"body": b"x", "headers": {"content-type": "text/plain"}}),
    ("get-unknown", 404, ("batch_not_found", "id"), {"path": f"{PATH}/{UNKNOWN}", "method": "GET"}),
    ("get-no-id", 404, ("batch_not_found", "id"), {"path": PATH + "/x", "method": "GET"}),
    ("cancel-unknown", 404, ("batch_not_found", "id"), {"path": f"{PATH}/{UNKNOWN}/cancel"}),
    ("of-another-key", 404, ("batch_not_found", "id"), {**_GET, "after": MADE, "key": "other-models"}),
    ("cancel-of-another-key", 404, ("batch_not_found", "id"), {"path": CANCEL, "after": MADE, "key": "other-models"}),
    *((f"query-{name}-{value[:3]}", 400, ("invalid_request", name), {"method": "GET", "params": {name: value}}) for name, value in (
        ("limit", "0"), ("limit", "101"), ("limit", "x"), ("after", "x"), ("after", files.UNKNOWN))),
]  # fmt: skip
WRONG_CODES = {f"error/batch/{name}": codes for name, _, codes, _ in WRONG}


def _made(name: str, fields: Mapping[str, Any], check: Callable[[Answer], None] = check, **more: Any) -> Case:
    return Case(
        **{"id": f"batch/{name}/made", "path": PATH, "body": {**BODY, **fields}, "check": check, "after": INPUT, **more}
    )


CASES: list[Case] = [
    Case(id=INPUT, path=files.PATH, form=files.FORM | {"file": b"{}\n"}, check=files.check),
    _made("plain", {}),
    _made("cancelled", {"metadata": {"to": "cancel"}}),
    _made("keyed", {"metadata": {"keyed": "yes"}}, headers={"idempotency-key": "batch"}),
    _made(
        "keyed-again", {"metadata": {"keyed": "yes"}}, headers={"idempotency-key": "batch", "x-request-id": "again"}, more=is_the_keyed_one
    ),
    *(_made(name, fields) for name, fields in ROWS.items()),
    Case(id="batch/get", path=ONE, method="GET", check=check_same, after=MADE),
    Case(id="batch/cancel", path=CANCEL, check=check_cancelled, after="batch/cancelled/made"),
    Case(id="batch/cancel/again", path=CANCEL, check=check_cancelled, after="batch/cancel"),
    *(Case(id=f"batch/page/{name}", path=PATH, method="GET", check=check_page, params=params) for name, params in PAGES.items()),
    *(
        Case(**{"id": f"error/batch/{name}", "path": PATH, "status": status, "check": check_wrong, **more})
        for name, status, _, more in WRONG
    ),
]  # fmt: skip
