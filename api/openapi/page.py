"""The page, put together from the table of routes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pipeline
from api.edge import dialect_of
from api.files import OCTETS
from api.guard import METRICS_PATH
from api.multipart import FORM
from api.openapi.answers import ChatChunk, CompletionChunk, ErrorAnswer
from api.openapi.examples import NO_BATCH, NO_FILE, NOT_FOUND, Example
from api.openapi.message_answers import AnthropicError
from api.openapi.operations import BATCHES, FILES, OPERATIONS, Operation
from api.openapi.parameters import HEADERS, PARAMETERS
from api.openapi.schemas import Schema, schemas_of
from api.rate_limits import HEADER_NAMES
from pipeline.surface.anthropic_errors import ANTHROPIC, MESSAGES_PATH, status_of_row
from pipeline.surface.errors import INTERNAL, TABLE

CHUNKS = (ChatChunk, CompletionChunk)
JSON, SSE = "application/json", "text/event-stream"
TEXT: Schema = {"type": "string"}
BYTES: Schema = {"type": "string", "format": "binary"}
UNKNOWN = {"request_not_found": NOT_FOUND, "file_not_found": NO_FILE, "batch_not_found": NO_BATCH}
OF_FILE = ("Content-Disposition", "Accept-Ranges", "ETag")
SECURITY: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "As OpenAI's clients show an API key"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "As Anthropic's clients show one"},
}  # fmt: skip
ABOUT = """Large language models served through queues. The bodies are those of OpenAI's and Anthropic's clients and of vLLM.

Fields that are not listed are ignored; `null` is the same as not given. `x-status` of an example is the status of its answer, by the
built-in model with the torch engine. `itemSchema` beside `text/event-stream` is that of each event, as OpenAPI 3.2 has it. Streams of
chunks end with `data: [DONE]`, after an error too; between events there may be comments, which are pings."""

_EVERYWHERE, _RETRIES = ("X-Request-Id",), ("x-should-retry", "Retry-After", "retry-after-ms")


def page(*, needs_key: bool, metrics_need_key: bool = True) -> dict[str, Any]:
    """The whole page of a server that asks for API keys, or does not."""
    by_type, components = schemas_of(_types())
    page = _Page(by_type, needs_key=needs_key, open_paths=() if metrics_need_key else (METRICS_PATH,))
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        for number, path in enumerate(filter(None, (operation.path, operation.also))):
            for method, said in page.methods(operation, "V1" if number else ""):
                paths.setdefault(path, {})[method] = said
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Baton", "version": pipeline.__version__, "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "parameters": {name.lower(): parameter for name, parameter in PARAMETERS.items()},
            "headers": {name.lower(): header for name, header in HEADERS.items()},
            **({"securitySchemes": SECURITY} if needs_key else {}),
        },
    }  # fmt: skip


def _types() -> Iterator[Any]:
    yield from (ErrorAnswer, AnthropicError)
    for operation in OPERATIONS:
        yield from (one for one in (operation.body, operation.answer, *operation.others.values()) if one is not None)
        yield from operation.events


class _Page:
    """What its operations have in common."""

    def __init__(self, by_type: dict[Any, Schema], *, needs_key: bool, open_paths: Sequence[str]) -> None:
        self._by_type = by_type
        self._needs_key = needs_key
        self._open_paths = open_paths

    def methods(self, operation: Operation, suffix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The operation, and what it is without its body where it reads."""
        said = self._operation(operation) | {"operationId": operation.id + suffix}
        yield operation.method, said
        if operation.method == "get":
            answers = {status: _without_content(answer) for status, answer in said["responses"].items()}
            yield "head", said | {"operationId": f"{operation.id}Head{suffix}", "responses": answers}

    def _operation(self, operation: Operation) -> dict[str, Any]:
        named = (*operation.parameters, "X-Request-Id")
        said: dict[str, Any] = {
            "tags": [operation.tag],
            "summary": operation.summary,
            "parameters": [_ref("parameters", name) for name in named],
            "responses": self._responses(operation),
            "security": [{name: []} for name in SECURITY] if self._asks_for_key(operation) else [],
        }
        if operation.body is not None:
            content = {"schema": self._by_type[operation.body], "examples": dict(map(_asked, operation.examples))}
            said["requestBody"] = {"required": True, "content": {FORM if operation.is_form else JSON: content}}
        return said

    def _asks_for_key(self, operation: Operation) -> bool:
        return self._needs_key and operation.needs_key and operation.path not in self._open_paths

    def _responses(self, operation: Operation) -> dict[str, Any]:
        examples: dict[int, dict[str, Any]] = {}
        for example in operation.examples:
            if example.answer is not None:
                examples.setdefault(example.status, {})[example.name] = {"value": example.answer}
        for code in UNKNOWN.keys() & operation.errors:
            examples[404] = {"unknown": {"value": UNKNOWN[code]}}
        errors = {
            status: _response(codes, {JSON: self._error_content(operation, examples.get(status, {}))}, self._headers(operation, status))
            for status, codes in self._codes(operation).items()
        }  # fmt: skip
        others = {
            status: _response("Not now", {JSON: {"schema": self._by_type[answer]}}, self._headers(operation, 200))
            for status, answer in operation.others.items()
        }
        good = _response(
            "What was asked for", self._content(operation, examples.get(200, {})), self._headers(operation, 200)
        )
        if operation.is_file:
            others[206] = _response(
                "The range that was asked for", self._content(operation, {}), self._headers(operation, 206)
            )
        return {str(status): said for status, said in sorted({200: good, **errors, **others}.items())}

    def _content(self, operation: Operation, examples: dict[str, Any]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        if operation.answer is not None:
            content[JSON] = {"schema": self._by_type[operation.answer]} | ({"examples": examples} if examples else {})
        if operation.events:
            content[SSE] = {"itemSchema": self._event(operation)}
        return content or ({OCTETS: {"schema": BYTES}} if operation.is_file else {"text/plain": {"schema": TEXT}})

    def _event(self, operation: Operation) -> Schema:
        """Each event of a stream. Chunks have no event for errors and none for the end: they are told of beside them."""
        chunks = [event for event in operation.events if event in CHUNKS]
        said = [self._by_type[event] for event in (*operation.events, *([ErrorAnswer] if chunks else []))]
        data = {"type": "string", "contentMediaType": JSON, "contentSchema": {"anyOf": said}}
        fields: Schema = {"data": {"anyOf": [{"type": "string", "enum": ["[DONE]"]}, data]} if chunks else data}
        if len(chunks) < len(operation.events):
            fields["event"] = TEXT | {"description": "The `type` of the data"}
        if len(chunks) == 0:
            return {"type": "object", "properties": fields, "required": ["event", "data"]}
        fields["id"] = TEXT | {"description": "In resumable streams: for `Last-Event-ID`"}
        return {"type": "object", "properties": fields, "required": ["data"]}

    def _error_content(self, operation: Operation, examples: dict[str, Any]) -> dict[str, Any]:
        kind = AnthropicError if dialect_of(operation.path) is ANTHROPIC else ErrorAnswer
        return {"schema": self._by_type[kind]} | ({"examples": examples} if examples else {})

    def _codes(self, operation: Operation) -> dict[int, str]:
        """What may be wrong, by status."""
        codes = list(operation.errors)
        if self._asks_for_key(operation):
            codes.append("invalid_api_key")
        if codes:
            codes.append("redis_unavailable")
        found: dict[int, list[str]] = {500: [INTERNAL.when]}
        for code in codes:
            if code == "permission_denied" and not self._needs_key:
                continue
            row = TABLE[code]
            status = status_of_row(row) if dialect_of(operation.path) is ANTHROPIC else row.status
            found.setdefault(status, []).append(f"`{code}`: {row.when}")
        return {status: "; ".join(lines) for status, lines in found.items()}

    def _headers(self, operation: Operation, status: int) -> dict[str, Any]:
        names = list(_EVERYWHERE)
        if f"{operation.path}/".startswith(f"{MESSAGES_PATH}/"):
            names.append("request-id")
        if operation.parameters and operation.errors and operation.tag not in (FILES, BATCHES):
            names.append("X-Baton-Request-Id")
        if operation.body is not None and status in (200, 429):
            names += HEADER_NAMES
        if operation.is_file and status < 300:
            names += OF_FILE
        if operation.is_file and status in (206, 416):
            names.append("Content-Range")
        if status >= 400:
            names += _RETRIES
        if status == 401:
            names.append("WWW-Authenticate")
        return {name: _ref("headers", name) for name in names}


def _response(description: str, content: dict[str, Any], headers: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "headers": headers, "content": content}


def _without_content(response: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in response.items() if name != "content"}


def _asked(example: Example) -> tuple[str, dict[str, Any]]:
    return example.name, {"summary": example.summary, "value": example.body, "x-status": example.status}


def _ref(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name.lower()}"}
