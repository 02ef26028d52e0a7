"""Requests that Hypothesis makes of valid ones: any field of a body at its bounds or as something else, headers, paths, and bytes that are
no JSON."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from api.headers import IDEMPOTENCY_KEY, LINGER, READ_TIMEOUT, RESUMABLE, TIMEOUT
from tests.fuzz.asks import ANSWER, HURRY, LEAVE, TEAR, Ask
from tests.openapi_page import Page

KNOWN_ID = "KNOWN-ID"  # in a path: stands for the id of a request that there was
DEPTH = 3  # of references that are followed for values

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, -(2**31) - 1, 2**63, -(2**64), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "a", "\x00", "\ud800", "é\u2028\U0001f600", "x" * 300, "x" * 20_000, "[[[[", "{}", [], [[]], [None], {}, {"": {}},
    {"type": "text"}, {"type": None}, [{"type": "image_url"}], ["a", 1],
]  # fmt: skip
TYPES = [b"application/json; charset=utf-8", b"text/plain", b"", b"application/x-www-form-urlencoded", b"\xff"]
MAKE_TEXT = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
HEADERS: dict[str, list[bytes]] = {
    RESUMABLE: [b"true", b"false", b"TRUE ", b"yes", b""],
    LINGER: [b"0", b"2", b"3600", b"3601", b"-1", b"nan", b"1e3"],
    TIMEOUT: [b"0", b"0.001", b"0.05", b"30", b"1e300", b"-1", b"inf", b"soon"],
    READ_TIMEOUT: [b"0", b"60", b"None", b"0.01"],
    IDEMPOTENCY_KEY: [b"one", b"two", b"three", b"", b"x" * 256, b"\xc3\xa9"],
    "X-Request-Id": [b"label", b"", b"x" * 500, b"\xff\xfe"],
    "Last-Event-ID": [b"0", b"-1", b"99999999", b"x", b""],
    "Content-Encoding": [b"gzip", b"identity"],
    "Authorization": [b"Bearer nobody", b"Basic eDp5", b"Bearer"],
}
TREATMENTS: list[list[tuple[bytes, bytes]]] = [
    [], [], [(RESUMABLE.encode(), b"true")], [(LINGER.encode(), b"2")], [(RESUMABLE.encode(), b"true"), (LINGER.encode(), b"2")],
    [(IDEMPOTENCY_KEY.encode(), b"left")],
]  # fmt: skip
MOMENTS = [0.001, 0.02, 0.05, 0.1, 0.2, 0.4]  # seconds after which a client goes
QUERIES = ["", "?stream=true", "?stream=true&starting_after=3", "?starting_after=1", "?limit=0", "?limit=100&order=asc", "?after=x",
           "?last_event_id=0", "?stream=%FF", "?limit=" + "9" * 40]  # fmt: skip
METHODS = ["GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "WOT"]
GARBAGE_IDS = ["x", "%00", "..", "chatcmpl-x", "%F0%9F%98%80", "a" * 5000, "resp_baton-tiny-J3pWmYbHq0eZtR5vXkLs2A"]


def mutated(page: dict[str, Any]) -> st.SearchStrategy[Ask]:
    """Requests of all kinds."""
    bodies = [
        (path, example["value"], _values(page, path)) for path, _, _, example in Page(page).examples()
    ]  # fmt: skip
    told = [
        (method.upper(), path) for path, method, operation in Page(page).operations() if "requestBody" not in operation
    ]
    changed, valid = _with_body(bodies), _left_within([one for one in bodies if one[0] in MAKE_TEXT])
    found, anywhere = _without_body(told), _anywhere([path for _, path in told])
    kinds = [changed] * 12 + [valid] * 4 + [found] * 3 + [anywhere]
    return st.sampled_from(kinds).flatmap(lambda kind: kind)


def _values(page: dict[str, Any], path: str) -> dict[str, list[Any]]:
    """Of each field of the bodies of a path."""
    ref = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    properties: dict[str, Any] = page["components"]["schemas"][ref.rpartition("/")[2]]["properties"]
    return {name: list(edges(page, schema)) for name, schema in properties.items()}


@st.composite
def _with_body(draw: Callable[..., Any], bodies: list[tuple[str, Any, dict[str, list[Any]]]]) -> Ask:
    path, body, values = draw(st.sampled_from(bodies))
    body = copy.deepcopy(body)
    if "stream" in values and draw(st.booleans()):
        body["stream"] = True
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        name = draw(st.sampled_from(sorted(values)))
        kind = draw(st.integers(0, 9))
        if kind < 6:
            body[name] = _one_of(draw, values[name])
        elif kind < 8:
            body[name] = _one_of(draw, ODD)
        elif kind == 8:
            body.pop(name, None)
        else:
            _change(draw, body)
    raw, kind = json.dumps(body).encode(), b"application/json"
    match draw(st.integers(0, 24)):
        case 0:
            raw = draw(_torn(raw))
        case 1:
            kind = draw(st.sampled_from(TYPES))
    manner = draw(st.sampled_from([ANSWER] * 12 + [LEAVE, HURRY, TEAR]))
    headers = [(b"Content-Type", kind), *draw(_headers())]
    after = draw(st.sampled_from(MOMENTS))
    return Ask("mutated body", "POST", path, path, headers, raw, manner=manner, leave_after=after)


@st.composite
def _left_within(draw: Callable[..., Any], bodies: list[tuple[str, Any, dict[str, list[Any]]]]) -> Ask:
    """A long answer whose client goes."""
    path, body, values = draw(st.sampled_from(bodies))
    long = {"max_output_tokens" if "max_output_tokens" in values else "max_tokens": 128}
    body = {**body, **long, "stream": draw(st.sampled_from([True, True, True, False]))}
    headers = [(b"Content-Type", b"application/json"), *draw(st.sampled_from(TREATMENTS))]
    manner, after = draw(st.sampled_from([LEAVE] * 3 + [HURRY])), draw(st.sampled_from(MOMENTS))
    raw = json.dumps(body).encode()
    return Ask("valid body", "POST", path, path, headers, raw, manner=manner, leave_after=after)


@st.composite
def _without_body(draw: Callable[..., Any], told: list[tuple[str, str]]) -> Ask:
    method, path = draw(st.sampled_from(told))
    target = path
    for name in ("{request_id}", "{response_id}", "{model}"):
        target = target.replace(name, draw(st.sampled_from([KNOWN_ID] * 9 + GARBAGE_IDS)))
    target += draw(st.sampled_from(QUERIES))
    manner = draw(st.sampled_from([ANSWER] * 10 + [LEAVE, HURRY]))
    after = draw(st.sampled_from(MOMENTS))
    return Ask("path and query", method, path, target, draw(_headers()), manner=manner, leave_after=after)


@st.composite
def _anywhere(draw: Callable[..., Any], paths: list[str]) -> Ask:
    """Any method of any path, of those that there are not, too."""
    method = draw(st.sampled_from(METHODS))
    path = draw(st.sampled_from([*paths, "/", "/v1", "/v1/nothing", "//", "/v1/chat/completions/"]))
    return Ask(
        "anywhere", method, "", path.partition("{")[0] + "x", draw(_headers()), draw(st.sampled_from([b"", b"{}"]))
    )


@st.composite
def _headers(draw: Callable[..., Any]) -> list[tuple[bytes, bytes]]:
    names = (
        draw(st.lists(st.sampled_from(sorted(HEADERS)), max_size=2, unique=True))
        if draw(st.integers(0, 2)) == 0
        else []
    )
    return [(name.encode(), draw(st.sampled_from(HEADERS[name]))) for name in names]


def _one_of(draw: Callable[..., Any], values: Sequence[Any]) -> Any:
    """One of the values, of its own: it may be changed within, and the next draw is to find them as they were."""
    return copy.deepcopy(draw(st.sampled_from(values)))


def _change(draw: Callable[..., Any], value: Any) -> None:
    """Something within the value is something else."""
    places = list(_places(value))
    holder, key = draw(st.sampled_from(places))
    match draw(st.integers(0, 2)):
        case 0:
            holder[key] = _one_of(draw, ODD)
        case 1:
            holder[key] = [holder[key]]
        case _:
            holder[key] = {"type": "text", "text": holder[key]}


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


@st.composite
def _torn(draw: Callable[..., Any], raw: bytes) -> bytes:
    """No JSON any more, or just so."""
    at = draw(st.integers(0, len(raw)))
    found = [
        raw[:at], raw[:at] + b"\xff" + raw[at:], b"\xef\xbb\xbf" + raw, raw + raw, b"[" * 50_000, b'{"model":' * 2000, b"null", b"[]",
        b'"x"', b"", raw.replace(b"}", b',"model":"baton-tiny"}', 1), raw.decode().encode("utf-16"), b"1e999999999",
        b'{"messages":' + b'[{"a":' * 3000,
    ]  # fmt: skip
    torn: bytes = draw(st.sampled_from(found))
    return torn


def edges(page: dict[str, Any], schema: dict[str, Any], depth: int = DEPTH) -> Iterator[Any]:
    """Values at the borders of what a schema allows, on both sides of them."""
    if ref := schema.get("$ref"):
        schema = page["components"]["schemas"][ref.rpartition("/")[2]]
    yield from schema.get("enum", ())
    if "default" in schema:
        yield schema["default"]
    for inner in (*schema.get("anyOf", ()), *schema.get("allOf", ())):
        yield from edges(page, inner, depth)
    match schema.get("type"):
        case "integer" | "number":
            low, high = schema.get("minimum", schema.get("exclusiveMinimum", 0)), schema.get("maximum", 8)
            yield from (low, low - 1, high, high + 1, (low + high) // 2, min(low + 1, high), 1.5)
        case "string":
            low, high = schema.get("minLength", 0), schema.get("maxLength", 40)
            yield from ("x" * size for size in (low, max(0, low - 1), high, high + 1, 4))
        case "boolean":
            yield from (True, False)
        case "array":
            inner = list(edges(page, schema.get("items", {}), depth - 1))[:6] if depth else []
            yield from ([], inner[:1], inner, inner[:1] * (min(schema.get("maxItems", 20), 2000) + 1))
        case "object":
            yield from _objects(page, schema, depth)
        case "null":
            yield None
        case None if "enum" not in schema and "anyOf" not in schema:
            yield from (True, "x", 1)


def _objects(page: dict[str, Any], schema: dict[str, Any], depth: int) -> Iterator[Any]:
    yield {}
    yield {"k": "v"}
    properties = schema.get("properties", {})
    if not depth or not properties:
        return
    values = {name: [*edges(page, inner, depth - 1)] or [1] for name, inner in properties.items()}
    for number in range(4):  # each with another value of each field
        yield {name: found[number % len(found)] for name, found in values.items()}
        yield {name: values[name][number % len(values[name])] for name in schema.get("required", ())}
