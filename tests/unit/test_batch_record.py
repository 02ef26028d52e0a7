"""What a batch is, told as OpenAI's clients know it, and which state may follow which."""

from __future__ import annotations

import json
import typing
from typing import Any

import msgspec
import pytest
from openai.types import Batch

from pipeline.batches.creating import LONGEST_WINDOW_S, batch_body, window_s
from pipeline.batches.record import ENDED, FOLLOWS, IDS, BatchRecord, LineError, shown
from pipeline.errors import InvalidRequest
from tests.openai_types import strictly

STATES = typing.get_args(Batch.model_fields["status"].annotation)
NEW = BatchRecord(
    id=IDS.new(1e9), owner="me", state="validating", endpoint="/v1/completions", input_file_id="file-1", window="24h",
    created_s=1_000_000_000, deadline_s=1_000_086_400,
)  # fmt: skip


def test_all_states_of_openai_are_there_and_every_one_comes_to_an_end() -> None:
    assert {*FOLLOWS, *ENDED} == set(STATES)
    assert not set(FOLLOWS) & set(ENDED)
    reached = {"validating"}
    for _ in STATES:
        reached |= {after for state in reached for after in FOLLOWS.get(state, ())}
        assert all(set(FOLLOWS[state]) for state in FOLLOWS)
    assert reached == set(STATES)


@pytest.mark.parametrize("state", STATES)
def test_what_has_ended_becomes_nothing_else(state: str) -> None:
    record = msgspec.structs.replace(NEW, state=state)
    assert record.has_ended == (state in ENDED)
    assert {after for after in STATES if record.may_become(after)} == set(FOLLOWS.get(state, ()))
    assert record.may_become("cancelling") == (state in ("validating", "in_progress"))


@pytest.mark.parametrize("state", STATES)
def test_a_batch_is_told_as_openais_type_has_it(state: str) -> None:
    times: dict[str, Any] = {
        f"{name}_s": 7
        for name in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    }
    errors = [LineError("c", "m", 3, "body.n"), LineError("empty_file", "nothing")]
    record = msgspec.structs.replace(
        NEW, state=state, metadata='{"a": "b"}', errors=msgspec.json.encode(errors).decode(), output_file_id="file-2",
        error_file_id="file-3", model="m", total=3, completed=1, failed=2, prompt_tokens=5, cached_tokens=1,
        completion_tokens=2, **times,
    )  # fmt: skip
    told = strictly(Batch, json.loads(msgspec.json.encode(shown(record))))
    assert told.errors is not None and told.errors.data is not None and told.usage is not None
    assert [(error.code, error.line, error.param) for error in told.errors.data] == [
        ("c", 3, "body.n"),
        ("empty_file", None, None),
    ]
    assert (told.status, told.metadata, told.usage.total_tokens, told.expires_at) == (
        state,
        {"a": "b"},
        7,
        1_000_086_400,
    )
    assert told.cancelled_at == told.finalizing_at == 7


@pytest.mark.parametrize("state", STATES)
def test_files_are_told_of_a_batch_that_has_ended(state: str) -> None:
    """Before that they may be made anew."""
    told = shown(msgspec.structs.replace(NEW, state=state, output_file_id="file-2", error_file_id="file-3"))
    assert {"output_file_id", "error_file_id"} <= set(told) or state not in ENDED
    assert not {"output_file_id", "error_file_id"} & set(told) or state in ENDED


def test_what_has_not_happened_is_not_told() -> None:
    told = strictly(Batch, json.loads(msgspec.json.encode(shown(NEW))))
    assert told.model_fields_set == {
        "id", "object", "endpoint", "input_file_id", "completion_window", "status", "created_at", "expires_at",
        "request_counts", "usage",
    }  # fmt: skip
    assert "owner" not in shown(NEW) and "models" not in shown(NEW)


def test_ids_are_in_the_order_of_time_and_cannot_be_guessed() -> None:
    ids = [IDS.new(second) for second in (1.0, 2.0, 1e9, 1e10)]
    assert ids == sorted(ids) and len({IDS.new(1.0) for _ in range(100)}) == 100
    assert all(IDS.has(one) for one in ids)
    assert not any(IDS.has(one) for one in ("", "batch_1", ids[0] + "0", ids[0].upper(), "x" + ids[0], ids[0] + "\n"))


@pytest.mark.parametrize(("window", "seconds"), [("24h", 86_400), ("1s", 1), ("90m", 5400), ("30d", LONGEST_WINDOW_S)])
def test_a_window_is_a_number_and_a_unit(window: str, seconds: int) -> None:
    assert window_s(window) == seconds


@pytest.mark.parametrize(
    "window", ["", "24", "h", "0h", "31d", "-1h", "1.5h", "24H", " 24h", "24h\n", "9999999h", "1w"]
)
def test_another_window_is_refused(window: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        body(completion_window=window)
    assert caught.value.param == "completion_window"


def body(**fields: Any) -> object:
    asked = {"input_file_id": "f", "endpoint": "/v1/completions", "completion_window": "24h"} | fields
    return batch_body(json.dumps({name: value for name, value in asked.items() if value is not ...}).encode())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_file_id": ...}, "input_file_id"),
        ({"input_file_id": 3}, "input_file_id"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"endpoint": ...}, "endpoint"),
        ({"completion_window": ...}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        body(**fields)
    assert str(caught.value.param).startswith(param)
