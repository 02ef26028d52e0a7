"""`/v1/files`: uploads go straight into the store and downloads straight out of it, a block at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
import structlog
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from msgspec import Meta
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from api.access import caller_of
from api.edge import MORE_HEADERS
from api.json_answers import json_answer, page_of
from api.multipart import Form
from api.queries import READ, number, word
from api.ranges import span_of
from api.service import Service
from pipeline.errors import BatonError, BodyTimeout, FileTooLarge, InvalidRequest, QueueFull
from pipeline.files.record import IDS, FileRecord
from pipeline.files.store import FileStore
from pipeline.surface.bodies import invalid
from pipeline.surface.fields import Anchor, Life

MOST_LISTED = 10_000
FORM_BYTES = 65_536  # of a form beside its file
COME_BACK_S = 5.0  # where as many uploads run as may: how long they take is not known
OCTETS = "application/octet-stream"

log = structlog.get_logger("baton.api")


class FileForm(msgspec.Struct, kw_only=True):
    """The form of an upload; its fields may come in any order. The two of `expires_after` go together."""

    file: Annotated[str, Meta(extra_json_schema={"format": "binary"})]
    purpose: Annotated[str, Meta(description="One of `files.purposes`")]
    expires_anchor: Anchor | None = msgspec.field(name="expires_after[anchor]", default=None)
    expires_s: Life | None = msgspec.field(name="expires_after[seconds]", default=None)


def file_routes(service: Service) -> APIRouter:
    """The routes of files."""
    router = APIRouter()
    uploads = Uploads(service.files.settings.max_uploads if service.files is not None else 0)

    @router.post("/v1/files")
    async def create(http: HttpRequest) -> Response:
        """Keep a file."""
        service.drain.check()
        if service.rates is not None:
            await service.rates.count_request(http)
        store = service.file_store
        with uploads.one():
            async with service.drain.within_grace():
                return json_answer(shown(await _kept(store, http, service.settings.body_timeout_s)))

    @router.api_route("/v1/files", methods=READ)
    async def listed(http: HttpRequest) -> Response:
        """The caller's files, a page at a time."""
        query = http.query_params
        newest_first = word(query, "order", ("desc", "asc")) == "desc"
        limit = number(query, "limit", MOST_LISTED, least=1, most=MOST_LISTED)
        after, purpose = query.get("after", ""), query.get("purpose", "")
        if after and not IDS.has(after):
            raise InvalidRequest(f"after: {after[:100]!r} is not the id of a file", param="after")
        found, more = await service.file_store.page(
            caller_of(http), purpose=purpose[:100], after=after, limit=limit, newest_first=newest_first
        )
        return json_answer(page_of([shown(record) for record in found], more))

    @router.api_route("/v1/files/{file_id}", methods=READ)
    async def show(http: HttpRequest, file_id: str) -> Response:
        """What is known of a file."""
        return json_answer(shown(await service.file_store.find(file_id, caller_of(http))))

    @router.api_route("/v1/files/{file_id}/content", methods=READ)
    async def content(http: HttpRequest, file_id: str) -> Response:
        """Its bytes, or a range of them."""
        record = await service.file_store.find(file_id, caller_of(http))
        return await _content(service, http, record)

    @router.delete("/v1/files/{file_id}")
    async def delete(http: HttpRequest, file_id: str) -> Response:
        """Forget a file and its bytes."""
        record = await service.file_store.find(file_id, caller_of(http))
        await service.file_store.delete(record)
        return json_answer({"id": record.id, "object": "file", "deleted": True})

    return router


class Uploads:
    """How many more may run now: each holds some blocks in memory, and a call of the store now and then."""

    def __init__(self, most: int) -> None:
        self._most = self._free = most

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Within this one runs. Raises QueueFull."""
        if not self._free:
            raise QueueFull(f"{self._most} uploads run here already: try again later", retry_after_s=COME_BACK_S)
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


def shown(record: FileRecord) -> dict[str, Any]:
    """A file as OpenAI's clients know it."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_s,
        **({"expires_at": record.expires_s} if record.expires_s else {}),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
    }


async def _kept(store: FileStore, http: HttpRequest, patience_s: float) -> FileRecord:
    """An upload, to its end. Raises InvalidRequest, BodyTimeout, and ClientDisconnect where the client leaves: nothing is left of it."""
    max_bytes, declared = store.settings.max_bytes, http.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes + FORM_BYTES:
        raise FileTooLarge(max_bytes)
    form, size = Form(http.headers), 0
    async with store.upload(max_bytes) as upload:
        async for part in _parts(http, patience_s):
            size += len(part)
            for data in form.feed(part):
                await upload.write(data)
            if size - upload.bytes > FORM_BYTES:
                raise InvalidRequest(
                    f"the form has more than {FORM_BYTES} bytes beside its file", code="body_too_large"
                )
            if "purpose" in form.fields:  # where it comes first, what is wrong with it is told first
                _check_purpose(form.fields["purpose"], store.settings.purposes)
        form.check_complete()
        asked = _checked(form.fields, store.settings.purposes)
        record = await upload.finish(
            owner=caller_of(http), purpose=asked.purpose, filename=form.filename or "",
            expires_after_s=asked.expires_s or store.settings.expires_after_s,
        )  # fmt: skip
    log.info("file kept", file_id=record.id, bytes=record.bytes, purpose=record.purpose)
    return record


async def _parts(http: HttpRequest, patience_s: float) -> AsyncIterator[bytes]:
    """The body as it comes. Raises BodyTimeout where nothing does for so long."""
    stream, more = aiter(http.stream()), True
    while more:
        try:
            async with asyncio.timeout(patience_s):
                part = await anext(stream, None)
        except TimeoutError as error:
            raise BodyTimeout(f"nothing came of the upload for {patience_s:g} s, and it is not whole") from error
        more = part is not None
        if part is not None:
            yield part


def _checked(fields: dict[str, str], purposes: str) -> FileForm:
    try:
        asked = msgspec.convert({**fields, "file": ""}, FileForm, strict=False)
    except msgspec.ValidationError as error:
        raise invalid(str(error), FileForm) from error
    _check_purpose(asked.purpose, purposes)
    if (asked.expires_anchor is None) != (asked.expires_s is None):
        raise InvalidRequest("expires_after: anchor and seconds go together", param="expires_after")
    return asked


def _check_purpose(purpose: str, purposes: str) -> None:
    if purpose not in purposes.split():
        raise InvalidRequest(
            f"purpose: expected {' or '.join(purposes.split())}, not {purpose[:100]!r}", param="purpose"
        )


async def _content(service: Service, http: HttpRequest, record: FileRecord) -> Response:
    try:
        is_other = http.headers.get("if-range", _etag(record)) != _etag(record)
        span = None if is_other else span_of(http.headers.get("range"), record.bytes)
    except InvalidRequest:
        http.scope.setdefault(MORE_HEADERS, {})["content-range"] = f"bytes */{record.bytes}"
        raise
    start, stop = span or (0, record.bytes)
    headers = {
        "accept-ranges": "bytes",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(record.filename, safe='')}",
        "content-length": str(stop - start),
        "etag": _etag(record),
        **({"content-range": span.of(record.bytes)} if span else {}),
    }
    status = 206 if span else 200
    if http.method == "HEAD":
        return Response(None, status, headers, OCTETS)
    blocks = service.file_store.blocks(record, start, stop)
    first = await anext(blocks, b"")  # what fails now is still an answer of its own
    return Download(service, _from(first, blocks), status, headers)


def _etag(record: FileRecord) -> str:
    return f'"{record.id}"'  # its bytes never change


async def _from(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for block in rest:
        yield block


class Download(StreamingResponse):
    """Bytes of a file. What goes wrong behind the headers cuts the connection: the client sees that bytes are missing."""

    def __init__(self, service: Service, content: AsyncIterator[bytes], status: int, headers: dict[str, str]) -> None:
        super().__init__(content, status, headers, OCTETS)
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; who takes nothing for too long gets no more."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._service.settings.send_timeout_s):
                await send(message)

        try:
            async with self._service.drain.within_grace():
                await super().__call__(scope, receive, send_in_time)
        except (BatonError, TimeoutError, ClientDisconnect) as error:
            log.info("a download did not end", path=scope["path"], error=str(error) or type(error).__name__)
