"""A form of `multipart/form-data` as it comes in: its bytes are pushed, and what is in them is given out; nothing of a file is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from pipeline.errors import InvalidRequest

if TYPE_CHECKING:  # where alone the library has it
    from python_multipart.multipart import MultipartCallbacks

FORM = "multipart/form-data"
FILE = "file"  # the one field that is a file
MOST_FIELDS, LONGEST_FIELD = 32, 4096  # bytes


@dataclasses.dataclass(slots=True)
class Field:
    """A field that is no file, and its bytes so far."""

    name: str
    value: bytearray = dataclasses.field(default_factory=bytearray)


class Form:
    """A form that is read once. `fields`: those that are whole; `filename`: of the file, None before it begins."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        """Raises InvalidRequest (unsupported_media_type) where the headers are of something else."""
        kind, options = parse_options_header(headers.get("content-type"))
        if kind != FORM.encode() or headers.get("content-encoding", "identity").lower() != "identity":
            raise InvalidRequest(f"expected {FORM} that is not compressed", code="unsupported_media_type")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.is_complete = False
        self._field: Field | None = None  # None: within the file
        self._header_name, self._header_value = bytearray(), bytearray()
        self._disposition = b""
        self._data: list[bytes] = []  # of the file, not given out yet
        self._parser = _parser(options.get(b"boundary", b""), self._callbacks())

    def feed(self, data: bytes) -> Iterator[bytes]:
        """More of the body. Gives out what of the file is in it; raises InvalidRequest where it is no form, or too large a one."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequest(f"the body is not {FORM}: {str(error)[:200]}") from error
        yield from self._data
        self._data.clear()

    def check_complete(self) -> None:
        """Raises InvalidRequest where the form has no end, or no file."""
        if not self.is_complete:
            raise InvalidRequest(f"the body is not {FORM}: it ends before its last boundary")
        if self.filename is None:
            raise InvalidRequest(f"{FILE}: required field is missing", param=FILE)

    def _callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        self._disposition = b""

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        name = options.get(b"name", b"").decode(errors="replace")
        if name != FILE:
            if len(self.fields) >= MOST_FIELDS:
                raise InvalidRequest(f"the form has more than {MOST_FIELDS} fields")
            self._field = Field(name)
            return
        if self.filename is not None:
            raise InvalidRequest(f"{FILE}: more than one is given; upload them one by one", param=FILE)
        self._field, self.filename = None, options.get(b"filename", b"").decode(errors="replace")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._data.append(data[start:end])
            return
        self._field.value += data[start:end]
        if len(self._field.value) > LONGEST_FIELD:
            name = self._field.name[:100]
            raise InvalidRequest(f"{name}: the field has more than {LONGEST_FIELD} bytes", param=name)

    def _on_part_end(self) -> None:
        if self._field is not None:
            self.fields[self._field.name[:100]] = self._field.value.decode(errors="replace")

    def _on_end(self) -> None:
        self.is_complete = True


def _parser(boundary: bytes, callbacks: MultipartCallbacks) -> MultipartParser:
    try:
        if not boundary:
            raise FormParserError("the content type names no boundary")
        return MultipartParser(boundary, callbacks)
    except FormParserError as error:
        raise InvalidRequest(f"the body is not {FORM}: {error}") from error
