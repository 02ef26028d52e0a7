"""Bounds and defaults that all bodies share."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import msgspec
import pytest

from pipeline.errors import InvalidRequest
from pipeline.surface import fields
from pipeline.surface.asks import wanted
from pipeline.surface.bodies import chat_body, completion_body

MESSAGES = [{"role": "user", "content": "Hello"}]


class Body(msgspec.Struct):
    plain: int | None = None
    refused: Annotated[Any, fields.unless(False, [])] = None


@pytest.mark.parametrize("value", [None, False, []])
def test_what_asks_for_nothing_is_welcome(value: Any) -> None:
    fields.refuse_unsupported(Body(refused=value))


@pytest.mark.parametrize("value", [True, 0, [1], {}, ""])
def test_what_asks_for_something_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="refused is not supported") as wrong:
        fields.refuse_unsupported(Body(refused=value))
    assert (wrong.value.param, wrong.value.code) == ("refused", "unsupported_parameter")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("n", fields.Choices), ("temperature", fields.Temperature), ("top_p", fields.TopP), ("top_k", fields.TopK),
        ("min_p", fields.MinP), ("presence_penalty", fields.Penalty), ("frequency_penalty", fields.Penalty),
        ("repetition_penalty", fields.RepetitionPenalty),
    ],
)  # fmt: skip
def test_the_default_that_is_told_is_the_one_that_holds(name: str, kind: Any) -> None:
    told = get_args(kind)[1].extra_json_schema["default"]
    for body in (
        chat_body(msgspec.json.encode({"model": "m", "messages": MESSAGES})),
        completion_body(msgspec.json.encode({"model": "m", "prompt": "Hello"})),
    ):
        assert getattr(wanted(body).sampling, name) == told
