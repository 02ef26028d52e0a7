"""One line of a batch, and what becomes of it where nothing goes as it should."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from pipeline.batches.lines import Line
from pipeline.surface.endpoints import Asker
from workers.batch.sending import LANE, Sender

BODY = json.dumps({"model": "m", "prompt": "x"}).encode()


def sender(pools: dict[str, Any]) -> Sender:
    return Sender(pools, Asker("me", LANE, "reasoning", 100), "batch_1", 1e12)


@pytest.mark.parametrize(
    ("pools", "status", "code"),
    [
        ({}, 404, "model_not_found"),
        ({"m": cast(Any, object())}, 500, "internal_error"),
    ],  # a pool with which nothing works
)
async def test_whatever_fails_in_a_line_is_its_answer_and_not_the_end_of_the_batch(
    pools: dict[str, Any], status: int, code: str
) -> None:
    result = await sender(pools).answer(Line(0, "a", "/v1/completions", BODY))
    assert (result.status, result.is_success) == (status, False)
    assert json.loads(result.body)["error"]["code"] == code
