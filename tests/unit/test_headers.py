"""Headers that say how a request is treated: what they cannot mean is named."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from api.generation import idempotency_key
from api.headers import Treatment, treatment
from pipeline.errors import InvalidRequest


def test_without_headers_nothing_is_special() -> None:
    assert treatment(Headers({})) == Treatment(False, 0.0, None, "")


def test_each_header_is_read() -> None:
    headers = {
        "x-baton-resumable": "True",
        "x-baton-linger": "30",
        "x-request-timeout": "2.5",
        "idempotency-key": "a key of my own!",
    }
    assert treatment(Headers(headers)) == Treatment(True, 30.0, 2.5, "a key of my own!")
    assert treatment(Headers({"x-baton-resumable": "false", "x-baton-linger": "0"})) == Treatment()


@pytest.mark.parametrize(
    ("headers", "streams", "timeout_s"),
    [
        ({}, False, 600.0),
        ({}, True, None),  # the time between two bytes, and there are pings
        ({"x-request-timeout": "5"}, False, 5.0),
        ({"x-request-timeout": "5"}, True, 5.0),
        ({"x-baton-resumable": "true"}, False, None),  # somebody may come back for it
        ({"x-baton-linger": "30"}, False, None),
        ({"idempotency-key": "k"}, False, None),
    ],
)
def test_a_client_that_waits_so_long_for_a_byte_gives_a_whole_answer_its_deadline(
    headers: dict[str, str], streams: bool, timeout_s: float | None
) -> None:
    assert treatment(Headers(headers | {"x-stainless-read-timeout": "600"}), streams=streams).timeout_s == timeout_s


@pytest.mark.parametrize("value", ["", "None", "0", "-1", "inf", "nan", "NOT_GIVEN"])
def test_what_the_client_puts_there_is_not_its_users_mistake(value: str) -> None:
    assert treatment(Headers({"x-stainless-read-timeout": value})).timeout_s is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Baton-Resumable", "yes"),
        ("X-Baton-Resumable", ""),
        ("X-Baton-Linger", "-1"),
        ("X-Baton-Linger", "3601"),
        ("X-Baton-Linger", "nan"),
        ("X-Baton-Linger", "soon"),
        ("X-Request-Timeout", "0"),
        ("X-Request-Timeout", "-3"),
        ("X-Request-Timeout", "inf"),
        ("X-Request-Timeout", "nan"),
        ("X-Request-Timeout", ""),
        ("Idempotency-Key", ""),
        ("Idempotency-Key", "x" * 256),
        ("Idempotency-Key", "schlüssel"),
        ("Idempotency-Key", "a\x7fb"),
    ],
)
def test_a_value_that_means_nothing_is_refused(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        treatment(Headers({name.lower(): value}))
    assert caught.value.param == name
    assert len(str(caught.value)) < 300


def test_a_key_belongs_to_its_caller_and_route() -> None:
    parts = [
        ("", "chat.completion", "k"),
        ("", "text_completion", "k"),
        ("o", "chat.completion", "k"),
        ("", "chat.completion", "l"),
    ]
    assert len({idempotency_key(*part) for part in parts}) == 4
