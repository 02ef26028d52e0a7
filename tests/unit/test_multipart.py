"""Forms as they come in: whole, torn anywhere, and wrong."""

from __future__ import annotations

import httpx
import pytest

from api.multipart import LONGEST_FIELD, MOST_FIELDS, Form
from pipeline.errors import InvalidRequest

BOUNDARY = "----line"
HEADERS = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
DATA = b'{"a": 1}\r\n------lin\r\n--\r\n\r\n------line-not\xff\x00' + b"\r" * 30


def part(disposition: str, data: bytes) -> bytes:
    return f"--{BOUNDARY}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode() + data + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
PURPOSE = part('name="purpose"', b"batch")
FILE = part('name="file"; filename="a.jsonl"', DATA)


def read(body: bytes, piece: int = 10**9, headers: dict[str, str] = HEADERS) -> tuple[Form, bytes]:
    form = Form(headers)
    data = b"".join(some for at in range(0, len(body), piece) for some in form.feed(body[at : at + piece]))
    form.check_complete()
    return form, data


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 20, 64, 1000])
@pytest.mark.parametrize("body", [PURPOSE + FILE + END, FILE + PURPOSE + END], ids=["file last", "file first"])
def test_a_form_is_the_same_however_it_comes(body: bytes, piece: int) -> None:
    form, data = read(body, piece)
    assert (form.fields, form.filename, data) == ({"purpose": "batch"}, "a.jsonl", DATA)


def test_what_the_official_client_sends() -> None:
    data = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    request = httpx.Request("POST", "http://x", data=data, files={"file": ("漢字.jsonl", DATA)})
    form, read_data = read(request.read(), 50, dict(request.headers))
    assert (form.fields, form.filename, read_data) == (data, "漢字.jsonl", DATA)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "ends before its last boundary"),
        (PURPOSE + FILE, "ends before its last boundary"),
        (PURPOSE + FILE[:-40], "ends before its last boundary"),
        (PURPOSE + END, "file: required field is missing"),
        (FILE + FILE + END, "more than one"),
        (b"not a form at all", "is not multipart/form-data"),
        (part('name="x"', b"y" * (LONGEST_FIELD + 1)) + END, "x: the field has more than"),
        (part('name="x"', b"y") * (MOST_FIELDS + 9) + FILE + END, None),
        (b"".join(part(f'name="x{n}"', b"y") for n in range(MOST_FIELDS + 1)) + END, "more than 32 fields"),
        (f"--{BOUNDARY}\r\n".encode() + b"X: " + b"y" * 100_000, "is not multipart/form-data"),
    ],
)
def test_what_is_no_form_is_told(body: bytes, message: str | None) -> None:
    if message is None:
        read(body)
        return
    for piece in (1, 10**9):
        with pytest.raises(InvalidRequest, match=message):
            read(body, piece)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "unsupported_media_type"),
        ({"content-type": "application/json"}, "unsupported_media_type"),
        ({"content-type": "multipart/mixed; boundary=x"}, "unsupported_media_type"),
        (HEADERS | {"content-encoding": "gzip"}, "unsupported_media_type"),
        ({"content-type": "multipart/form-data"}, "invalid_request"),
        ({"content-type": "multipart/form-data; boundary=" + "x" * 999}, "invalid_request"),
    ],
)
def test_headers_of_something_else(headers: dict[str, str], code: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        Form(headers)
    assert wrong.value.code == code
