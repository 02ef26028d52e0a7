"""Answers of a server, held against the page of `/openapi.json`: status, content type, schema, every event of a stream."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema_rs

SSE = "text/event-stream"
LABELS = ("x-request-id", "x-should-retry")  # headers that every answer has, and every error


class Page:
    """The page of a server. What is wrong with an answer is an AssertionError."""

    def __init__(self, page: dict[str, Any]) -> None:
        self._page = page
        self._patterns = {
            path: re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(path))) for path in page["paths"]
        }  # fmt: skip

    def operations(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Each path with its method and what is said of it."""
        for path, methods in self._page["paths"].items():
            for method, operation in methods.items():
                yield path, method, operation

    def examples(self) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
        """Path, name, method and example of each body that is shown."""
        for path, method, operation in self.operations():
            for name, example in _content(operation.get("requestBody", {})).get("examples", {}).items():
                yield path, method, name, example

    def shown(self, path: str, method: str, status: int, name: str) -> dict[str, Any] | None:
        """The answer that the page shows of an example."""
        answer = self._page["paths"][path][method]["responses"][str(status)]
        example = _content(answer).get("examples", {}).get(name)
        return None if example is None else example["value"]

    def path_of(self, target: str) -> str:
        """The path of the page that a request's path is; the narrowest. Raises LookupError."""
        found = [path for path, pattern in self._patterns.items() if pattern.fullmatch(target)]
        if not found:
            raise LookupError(target)
        return min(found, key=lambda path: (path.count("{"), -len(path)))

    def check(self, path: str, method: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """An answer is one that the page tells of. `headers`: by names in small letters."""
        answers = self._page["paths"][path][method]["responses"]
        assert str(status) in answers, f"{method} {path}: nothing is told of status {status}: {body[:300]!r}"
        told = answers[str(status)]
        for label in LABELS if status >= 400 and status != 503 else LABELS[:1]:
            assert label in headers, f"{method} {path}: {status} without {label}"
        if method == "head":
            assert not body
            return
        kind = headers.get("content-type", "").partition(";")[0]
        assert kind in told["content"], f"{method} {path}: {status} has content type {kind!r}"
        content = told["content"][kind]
        if kind == "application/json":
            self._check_json(content["schema"], body, f"{method} {path}: {status}")
        elif kind == SSE:
            told = content["itemSchema"]["properties"]["data"]
            schema = next(one for one in (told, *told.get("anyOf", ())) if "contentSchema" in one)["contentSchema"]
            for data in events_in(body):
                if data != b"[DONE]" or "anyOf" not in told:
                    self._check_json(schema, data, f"{method} {path}: event")

    def _check_json(self, schema: dict[str, Any], body: bytes, where: str) -> None:
        validator, value = self._validator(json.dumps(schema)), json.loads(body)
        if not validator.is_valid(value):
            wrong = "; ".join(f"{error.instance_path}: {error.message[:300]}" for error in validator.iter_errors(value))
            raise AssertionError(f"{where}: {wrong}: {body[:500]!r}")

    @functools.lru_cache(maxsize=1000)  # noqa: B019  # one page a run
    def _validator(self, schema: str) -> Any:
        return jsonschema_rs.validator_for({**json.loads(schema), "components": self._page["components"]})


def events_in(stream: bytes) -> Iterator[bytes]:
    """The data of each event; what is cut off at the end is none."""
    for block in stream.split(b"\n\n")[:-1]:
        lines = [line for line in block.split(b"\n") if not line.startswith(b":")]
        yield from (line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: "))


def _content(said: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = said.get("content", {}).get("application/json", {})
    return found
