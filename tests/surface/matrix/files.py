"""Files: uploaded, listed, read whole and in parts, deleted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from openai.types import FileDeleted, FileObject, FilePurpose
from pydantic import BaseModel

from tests.openai_types import strictly
from tests.surface.matrix.case import Answer, Case

PATH = "/v1/files"
ONE, CONTENT = PATH + "/{id}", PATH + "/{id}/content"
LINES = b'{"custom_id": "1"}\n{"custom_id": "2"}\n' * 100
FORM: dict[str, str | bytes] = {"purpose": "batch", "file": LINES}
LIFE = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
MADE = "file/plain/made"
UNKNOWN = "file-" + "0" * 46


class Files(BaseModel):
    """The page that OpenAI's client reads; its own type is bound to the client."""

    object: str
    data: list[FileObject]
    first_id: str
    last_id: str
    has_more: bool


def check(answer: Answer) -> None:
    """An upload, and what is told of it later."""
    made = strictly(FileObject, answer.json)
    assert (made.filename, made.purpose, made.status) == ("a.jsonl", "batch", "processed")
    assert made.expires_at is not None
    if answer.case.form is not None:
        assert made.bytes == len(answer.case.form["file"])
        assert made.expires_at - made.created_at == int(answer.case.asked.get("expires_after[seconds]", 2_592_000))
    else:
        assert answer.json == answer.before.json


def check_deleted(answer: Answer) -> None:
    assert strictly(FileDeleted, answer.json).id == answer.before.id


def check_page(answer: Answer) -> None:
    page = strictly(Files, answer.json)
    ids = [one.id for one in page.data]
    assert ids == sorted(ids, reverse=answer.case.params.get("order") != "asc")
    assert (page.first_id, page.last_id) == ((ids[0], ids[-1]) if ids else ("", ""))
    assert len(ids) <= int(answer.case.params.get("limit", 10_000))


def check_content(answer: Answer) -> None:
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''a.jsonl"
    assert answer.headers["etag"] == f'"{answer.before.id}"'
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert ("content-range" in answer.headers) == (answer.status == 206)


def is_part(start: int, stop: int) -> Callable[[Answer], None]:
    def check_part(answer: Answer) -> None:
        assert answer.content == LINES[start:stop]
        if answer.status == 206:
            assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(LINES)}"

    return check_part


def check_wrong(answer: Answer) -> None:
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == WRONG_CODES[answer.case.id]
    if answer.status == 404:
        assert error["message"].startswith("No such File object: ")
    if answer.status == 416:
        assert answer.headers["content-range"] == f"bytes */{len(LINES)}"


RANGES: dict[str, tuple[str, int, tuple[int, int]]] = {
    "first": ("bytes=0-9", 206, (0, 10)),
    "middle": ("bytes=100-199", 206, (100, 200)),
    "from": ("bytes=3000-", 206, (3000, len(LINES))),
    "last": ("bytes=-7", 206, (len(LINES) - 7, len(LINES))),
    "beyond": ("bytes=10-999999", 206, (10, len(LINES))),
    "two": ("bytes=0-1,3-4", 200, (0, len(LINES))),
    "no-unit": ("0-1", 200, (0, len(LINES))),
}
PAGES: dict[str, Mapping[str, str]] = {
    "all": {},
    "oldest-first": {"order": "asc"},
    "one": {"limit": "1"},
    "purpose": {"purpose": "batch"},
    **{f"purpose-{purpose}": {"purpose": purpose} for purpose in get_args(FilePurpose) if purpose != "batch"},
}
WRONG: list[tuple[str, int, tuple[str, str | None], dict[str, Any]]] = [
    ("no-file", 400, ("invalid_request", "file"), {"form": {"purpose": "batch", "other": b"x"}}),
    ("no-purpose", 400, ("invalid_request", "purpose"), {"form": {"file": LINES}}),
    ("purpose", 400, ("invalid_request", "purpose"), {"form": FORM | {"purpose": "vision"}}),
    ("anchor", 400, ("invalid_request", "expires_after[anchor]"), {"form": FORM | LIFE | {"expires_after[anchor]": "now"}}),
    ("seconds", 400, ("invalid_request", "expires_after[seconds]"), {"form": FORM | LIFE | {"expires_after[seconds]": "3599"}}),
    ("seconds-text", 400, ("invalid_request", "expires_after[seconds]"), {"form": FORM | LIFE | {"expires_after[seconds]": "x"}}),
    ("seconds-alone", 400, ("invalid_request", "expires_after"), {"form": FORM | {"expires_after[seconds]": "3600"}}),
    ("long-field", 400, ("invalid_request", "note"), {"form": FORM | {"note": "x" * 5000}}),
    ("json", 415, ("unsupported_media_type", None), {"body": {"purpose": "batch"}}),
    ("no-boundary", 400, ("invalid_request", None), {"body": b"x", "headers": {"content-type": "multipart/form-data"}}),
    ("torn", 400, ("invalid_request", None), {"body": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}),
    ("too-large", 413, ("file_too_large", "file"), {"form": FORM | {"file": b"x" * 100_001}}),
    ("far-too-large", 413, ("file_too_large", "file"), {"form": FORM | {"file": b"x" * 3_000_000}}),
    ("get-unknown", 404, ("file_not_found", "id"), {"path": f"{PATH}/{UNKNOWN}", "method": "GET"}),
    ("content-unknown", 404, ("file_not_found", "id"), {"path": f"{PATH}/{UNKNOWN}/content", "method": "GET"}),
    ("delete-unknown", 404, ("file_not_found", "id"), {"path": f"{PATH}/{UNKNOWN}", "method": "DELETE"}),
    ("no-id", 404, ("file_not_found", "id"), {"path": PATH + "/x", "method": "GET"}),
    ("of-another-key", 404, ("file_not_found", "id"), {"path": ONE, "method": "GET", "key": "other-models", "after": MADE}),
    ("deleted", 404, ("file_not_found", "id"), {"path": ONE, "method": "GET", "after": "file/delete/deleted"}),
    ("range", 416, ("range_not_satisfiable", "Range"), {"path": CONTENT, "method": "GET", "after": MADE,
        "headers": {"range": "bytes=9999-"}}),
    *((f"query-{name}", 400, ("invalid_request", name), {"method": "GET", "params": {name: value}}) for name, value in (
        ("limit", "0"), ("order", "up"), ("after", "x"))),
]  # fmt: skip
WRONG_CODES = {f"error/file/{name}": codes for name, _, codes, _ in WRONG}


def _read(name: str, path: str, check: Callable[[Answer], None], **more: Any) -> Case:
    return Case(id=f"file/{name}", path=path, method="GET", check=check, after=MADE, **more)


CASES: list[Case] = [
    Case(id=MADE, path=PATH, form=FORM, check=check),
    Case(id="file/expires/made", path=PATH, form=FORM | LIFE, check=check),
    Case(id="file/empty/made", path=PATH, form=FORM | {"file": b""}, check=check),
    Case(id="file/unknown-field/made", path=PATH, form=FORM | {"more": "x"}, check=check),
    Case(id="file/largest/made", path=PATH, form=FORM | {"file": b"x" * 100_000}, check=check),
    Case(id="file/delete/made", path=PATH, form=FORM | {"file": b"short"}, check=check),
    Case(id="file/delete/deleted", path=ONE, method="DELETE", check=check_deleted, after="file/delete/made"),
    _read("get", ONE, check),
    _read("content", CONTENT, check_content, more=is_part(0, len(LINES))),
    *(
        _read(f"content/{name}", CONTENT, check_content, headers={"range": header}, status=status, more=is_part(*part))
        for name, (header, status, part) in RANGES.items()
    ),
    _read("content/if-range", CONTENT, check_content, headers={"range": "bytes=0-9", "if-range": '"x"'}, more=is_part(0, len(LINES))),
    Case(id="file/empty/content", path=CONTENT, method="GET", check=check_content, after="file/empty/made", more=is_part(0, 0)),
    *(_read(f"page/{name}", PATH, check_page, params=params) for name, params in PAGES.items()),
    *(
        Case(**{"id": f"error/file/{name}", "path": PATH, "status": status, "check": check_wrong, **more})
        for name, status, _, more in WRONG
    ),
]  # fmt: skip
