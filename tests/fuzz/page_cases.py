"""Requests that schemathesis makes of the page: such as it allows, and such as it does not."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import httpx
import requests
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.fuzz.asks import Ask, drawn
from tests.system import POOL

BASE = "http://baton.test"
CONFORMANCE = [status_code_conformance, content_type_conformance, response_schema_conformance]
CHECKS = {
    GenerationMode.POSITIVE: [*CONFORMANCE, unsupported_method],
    GenerationMode.NEGATIVE: [*CONFORMANCE, unsupported_method, negative_data_rejection],
}
MAY_BE_UNREADY = (503, 504)  # of these the run decides by what was asked for


def page_cases(page: dict[str, Any], each: int, number: int) -> list[Ask]:
    """Up to `each` requests of each operation and kind, shuffled."""
    schema = schemathesis.openapi.from_dict(_for_one_model(page))
    schema.config.update(base_url=BASE)
    asks = [ask for operation in schema.get_all_operations() for ask in _of(operation.ok(), each, number)]
    random.Random(number).shuffle(asks)
    return asks


def _for_one_model(page: dict[str, Any]) -> dict[str, Any]:
    """Most requests are to get behind the name of the model."""
    page = copy.deepcopy(page)
    for name, schema in page["components"]["schemas"].items():
        if name.endswith("Body") and "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": [POOL] if "model" in schema["required"] else [POOL, None]}
    return page


def _of(operation: Any, each: int, number: int) -> Iterator[Ask]:
    count = each if operation.method == "post" and "{" not in operation.path else max(1, each // 8)
    for mode, checks in CHECKS.items():
        for case in drawn(operation.as_strategy(generation_mode=mode), count, number):
            yield _ask(case, mode, checks)


def _ask(case: Any, mode: GenerationMode, checks: list[Any]) -> Ask:
    prepared = requests.Request(**_arguments(case)).prepare()
    body = prepared.body or b""

    def check(response: httpx.Response) -> None:
        beyond = [] if response.status_code in MAY_BE_UNREADY else [not_a_server_error]
        case.validate_response(response, checks=[*checks, *beyond])

    return Ask(
        source=f"page, {mode.name.lower()}",
        method=case.method,
        path=case.operation.path if case.method.lower() == case.operation.method else "",
        target=prepared.url.removeprefix(BASE),
        headers=[(_bytes(name), _bytes(value)) for name, value in prepared.headers.items()],
        body=body.encode() if isinstance(body, str) else body,
        check=check,
    )


def _arguments(case: Any) -> dict[str, Any]:
    known = ("method", "url", "headers", "params", "data", "json", "cookies", "files")
    return {name: value for name, value in case.as_transport_kwargs(base_url=BASE).items() if name in known}


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
