"""The page of `/openapi.json` says what the application has: no route more, none less, and bounds as they are checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from api.app import create_app
from api.openapi.page import page
from pipeline.config import ApiSettings
from pipeline.errors import InvalidRequest
from pipeline.surface.bodies import chat_body, completion_body
from pipeline.surface.errors import TABLE

PAGE = page(needs_key=True)
METHODS = ("get", "head", "post", "delete")
NOWHERE = {"not_found", "method_not_allowed"}  # of no path that there is


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in PAGE["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def routes_of(app: FastAPI) -> set[tuple[str, str]]:
    routes: set[tuple[str, str]] = set()

    def look(at: Any, prefix: str = "") -> None:
        for route in at:
            if isinstance(route, APIRoute):
                path = re.sub(r":path}", "}", route.path)
                routes.update((path, method.lower()) for method in route.methods)
            elif hasattr(route, "original_router"):
                look(route.original_router.routes)

    look(app.routes)
    return routes


def test_every_route_is_on_the_page_and_nothing_else() -> None:
    routes = routes_of(create_app(ApiSettings(), {}))
    assert len(routes) > 20
    assert {(path, method) for path, method, _ in operations()} == routes


def test_what_is_read_answers_head_too() -> None:
    routes = routes_of(create_app(ApiSettings(), {}))
    assert {path for path, method in routes if method == "get"} == {path for path, method in routes if method == "head"}


def test_operations_have_ids_of_their_own() -> None:
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(ids) == len(set(ids))


def test_every_code_of_an_error_is_told_where_it_may_come() -> None:
    told = {
        code for _, _, operation in operations() for answer in operation["responses"].values()
        for code in re.findall(r"`(\w+)`: ", answer["description"])
    }  # fmt: skip
    assert told == set(TABLE) - NOWHERE


def test_references_lead_somewhere_and_nothing_is_left_alone() -> None:
    text = msgspec.json.encode(PAGE).decode()
    referred = set(re.findall(r'"#/components/(\w+)/([^"]+)"', text))
    there = {(kind, name) for kind, named in PAGE["components"].items() for name in named if kind != "securitySchemes"}
    assert referred - there == set()
    assert {one for one in there - referred if one[0] != "headers"} == set()


def test_examples_are_of_the_schemas_beside_them() -> None:
    count = 0
    for path, method, operation in operations():
        contents = [operation.get("requestBody", {}), *operation["responses"].values()]
        for content in (one for each in contents for one in each.get("content", {}).values()):
            for name, example in content.get("examples", {}).items():
                check = validator(content["schema"])
                count += 1
                is_wrong = example.get("x-status") == 400
                assert is_wrong or check.is_valid(example["value"]), f"{method} {path}: {name}"
    assert count > 30


def test_a_page_without_keys_asks_for_none() -> None:
    without = page(needs_key=False)
    assert all(not one["security"] for methods in without["paths"].values() for one in methods.values())
    assert "securitySchemes" not in without["components"]
    assert not any("401" in one["responses"] for methods in without["paths"].values() for one in methods.values())
    assert page(needs_key=True, metrics_need_key=False)["paths"]["/metrics"]["get"]["security"] == []


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 2.1}, {"top_p": 0}, {"n": 129}, {"n": 0}, {"stop": ["a"] * 17}, {"stop": ""}, {"seed": 2**63}, {"top_k": -2},
        {"logit_bias": {"1": 101}}, {"min_tokens": -1}, {"service_tier": "fastest"}, {"stream": "yes"}, {"use_beam_search": True},
        {"max_tokens": -1}, {"repetition_penalty": 0}, {"cache_salt": ""}, {"guided_choice": []},
    ],
)  # fmt: skip
def test_the_page_refuses_what_the_check_refuses(fields: dict[str, Any]) -> None:
    chat = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], **fields}
    completion = {"model": "m", "prompt": "Hello", **fields}
    for body, check, schema in ((chat, chat_body, "ChatBody"), (completion, completion_body, "CompletionBody")):
        with pytest.raises(InvalidRequest):
            check(msgspec.json.encode(body))
        assert not validator({"$ref": f"#/components/schemas/{schema}"}).is_valid(body)
        for name in fields:
            body[name] = None
        check(msgspec.json.encode(body))
        assert validator({"$ref": f"#/components/schemas/{schema}"}).is_valid(body)


def validator(schema: dict[str, Any]) -> Any:
    return jsonschema_rs.validator_for({**schema, "components": PAGE["components"]})
