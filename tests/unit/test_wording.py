"""Words that messages share, and ids as people paste them."""

from __future__ import annotations

import pytest

from pipeline.ids import bare_id, new_request_id
from pipeline.wording import counted, without_passwords


def test_one_is_not_many() -> None:
    assert [counted(number, "task") for number in (0, 1, 2)] == ["0 tasks", "1 task", "2 tasks"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://me:secret@host:6379/0", "redis://me:***@host:6379/0"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("unix://:secret@/run/redis.sock", "unix://:***@/run/redis.sock"),
        ("redis+sentinel://a,b/m?sentinel_password=secret&x=1", "redis+sentinel://a,b/m?sentinel_password=***&x=1"),
    ],
)
def test_an_address_is_shown_without_its_passwords(url: str, shown: str) -> None:
    assert without_passwords(url) == shown


def test_an_id_is_found_in_what_an_answer_calls_it() -> None:
    request_id = new_request_id("baton-tiny")
    for text in (request_id, f"chatcmpl-{request_id}", f"cmpl-{request_id}"):
        assert bare_id(text, ["baton-tiny"]) == request_id
    of_another = new_request_id("cmpl-pool")  # a pool may be named so
    assert bare_id(of_another, ["cmpl-pool"]) == of_another
    assert bare_id("nonsense", ["baton-tiny"]) == "nonsense"
