"""The input of a batch: lines of JSON, read in blocks and never held as a whole, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import AsyncIterator, Callable, Collection
from typing import NamedTuple

import msgspec

from pipeline.batches.record import LineError
from pipeline.errors import BatonError, FileLost, InvalidRequest
from pipeline.protocol import UNREADABLE
from pipeline.surface.bodies import invalid
from pipeline.surface.endpoints import ENDPOINTS

MOST_ERRORS = 100  # that are told of one file
LONGEST_ID = 512  # characters of a custom_id
BOM = b"\xef\xbb\xbf"
FORMS = {  # of files that are no lines of JSON, by how they begin
    b"\x1f\x8b": "packed by gzip", b"PK\x03\x04": "packed by zip", b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"\xff\xfe": "in UTF-16", b"\xfe\xff": "in UTF-16",
}  # fmt: skip


class RawLine(NamedTuple):
    """A line as it stands in the file: its number from 0, where it begins, and its bytes; None where it is too long."""

    number: int
    offset: int
    data: bytes | None


class Line(NamedTuple):
    """A line that was understood. `body`: JSON, not yet read."""

    number: int
    custom_id: str
    url: str
    body: bytes


class _Line(msgspec.Struct):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


_decode = msgspec.json.Decoder(_Line).decode


async def raw_lines(
    blocks: AsyncIterator[bytes], longest: int, *, number: int = 0, offset: int = 0
) -> AsyncIterator[RawLine]:
    """The lines of a file that has something in them, from the line `number` at `offset` on. `\\r\\n` ends a line as `\\n` does, and the
    last one needs no end. Of a line of more than `longest` bytes nothing is kept."""
    pending, is_long, begin = bytearray(), False, offset
    async for block in blocks:
        at = 0
        while (end := block.find(b"\n", at)) >= 0:
            is_long = is_long or len(pending) + end - at > longest
            said = None if is_long else _stripped(bytes(pending) + block[at:end], begin)
            if said is None or said.strip():
                yield RawLine(number, begin, said)
            offset, at, number = offset + end + 1 - at, end + 1, number + 1
            pending, is_long, begin = bytearray(), False, offset
        rest = len(block) - at
        is_long = is_long or len(pending) + rest > longest
        if is_long:
            pending.clear()
        else:
            pending += block[at:]
        offset += rest
    said = None if is_long else _stripped(bytes(pending), begin)
    if said is None or said.strip():
        yield RawLine(number, begin, said)


def _stripped(data: bytes, offset: int) -> bytes:
    """Without the mark that some editors put in front of a file, and without `\\r`."""
    return (data.removeprefix(BOM) if offset == 0 else data).removesuffix(b"\r")


def line_of(raw: RawLine, longest: int) -> Line:
    """What a line says. Raises BadLine."""
    if raw.data is None:
        raise BadLine(raw.number, "line_too_long", f"the line has more than {longest} bytes (batches.max_line_bytes)")
    try:
        line = _decode(raw.data)
    except msgspec.ValidationError as error:
        wrong = invalid(str(error), _Line)
        raise BadLine(raw.number, "invalid_line", f"the line is no request of a batch: {wrong}", wrong.param) from error
    except UNREADABLE as error:
        raise BadLine(raw.number, "invalid_json_line", f"the line is not valid JSON: {error}") from error
    if line.method != "POST":
        raise BadLine(raw.number, "invalid_method", f"method {line.method[:32]!r} is not POST", "method")
    if not 0 < len(line.custom_id) <= LONGEST_ID:
        raise BadLine(raw.number, "invalid_custom_id", f"custom_id has 1 to {LONGEST_ID} characters", "custom_id")
    return Line(raw.number, line.custom_id, line.url, bytes(line.body))


def line_again(raw: RawLine) -> Line:
    """A line that was right when its batch was validated. Raises FileLost."""
    try:
        return line_of(raw, len(raw.data or b""))
    except BadLine as error:
        raise FileLost(f"line {raw.number + 1} of the input is not what it was: {error}") from error


class BadLine(Exception):
    """A line that makes its batch fail."""

    def __init__(self, number: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.error = LineError(code, message, number + 1, param)


@dataclasses.dataclass
class Findings:
    """What reading a whole file found. `lines`: what the numbers of its lines are below; `models`: of its lines; `errors`: the first."""

    lines: int = 0
    total: int = 0
    models: set[str] = dataclasses.field(default_factory=set)
    errors: list[LineError] = dataclasses.field(default_factory=list)

    def add(self, error: LineError) -> None:
        """One more, where there are not too many to tell."""
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(error)


async def check(
    lines: AsyncIterator[RawLine], endpoint: str, *, most_lines: int, longest: int, serves: Callable[[str], None]
) -> Findings:
    """Read all lines of a batch for `endpoint`, none of which runs where one is wrong. `serves` raises BatonError for a model that its
    owner cannot use."""
    findings, seen = Findings(), dict[bytes, int]()
    async for raw in lines:
        findings.lines, findings.total = raw.number + 1, findings.total + 1
        if findings.total == 1 and (form := _form_of(raw)):
            what = f"the file is {form}: expected lines of JSON in UTF-8, which it is not turned to here"
            findings.add(LineError("invalid_file", what, raw.number + 1))
            return findings
        if findings.total > most_lines:
            what = f"the file has more than {most_lines} requests (batches.max_lines)"
            findings.add(LineError("too_many_requests", what, raw.number + 1))
            return findings
        try:
            line = line_of(raw, longest)
            _check_line(line, endpoint, seen)
            findings.models.add(_check_model(line, findings.models, serves))
        except BadLine as bad:
            findings.add(bad.error)
    if not findings.total:
        findings.add(LineError("empty_file", "the file has no requests"))
    return findings


def _form_of(raw: RawLine) -> str:
    return next((form for mark, form in FORMS.items() if raw.data is not None and raw.data.startswith(mark)), "")


def _check_line(line: Line, endpoint: str, seen: dict[bytes, int]) -> None:
    if line.url != endpoint:
        what = f"url {line.url[:64]!r} is not the endpoint of the batch, {endpoint}"
        raise BadLine(line.number, "mismatched_url", what, "url")
    mark = hashlib.blake2b(line.custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
    first = seen.setdefault(mark, line.number)
    if first != line.number:
        what = f"custom_id {line.custom_id[:64]!r} is that of line {first + 1} already"
        raise BadLine(line.number, "duplicate_custom_id", what, "custom_id")
    try:
        ENDPOINTS[endpoint].read(line.body)
    except InvalidRequest as error:
        raise BadLine(line.number, error.code, str(error), f"body.{error.param}" if error.param else "body") from error


def _check_model(line: Line, known: Collection[str], serves: Callable[[str], None]) -> str:
    """Its model. `known`: those that are served; nothing is kept of others, of which there may be a long one in each line."""
    model: str = model_of(line.body)
    if model not in known:
        try:
            serves(model)
        except BatonError as error:
            raise BadLine(line.number, error.code, str(error), "body.model") from error
    return model


class _Modelled(msgspec.Struct):
    model: str


_model = msgspec.json.Decoder(_Modelled).decode


def model_of(body: bytes) -> str:
    """The model that a body asks, which was read before."""
    return _model(body).model
