"""Ids and names of files."""

from __future__ import annotations

import pytest

from pipeline.files.record import IDS, FileRecord, clean_name


def test_ids_are_in_the_order_of_their_making_and_never_the_same() -> None:
    times = [0.0, 1.5, 1_800_000_000.0, 1_800_000_000.000001, 9_999_999_999.0]
    ids = [IDS.new(now_s) for now_s in times]
    assert sorted(ids) == ids
    assert [IDS.made_s(one) for one in ids] == pytest.approx(times, abs=1e-5)
    assert all(map(IDS.has, ids))
    assert len({IDS.new(1.0) for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    "text", ["", "file-", "file-abc", "file-" + "g" * 46, "file-" + "0" * 45, "file-" + "0" * 46 + "\n", "x" * 51]
)
def test_what_is_no_id(text: str) -> None:
    assert not IDS.has(text)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("batch.jsonl", "batch.jsonl"), ("../../etc/passwd", "passwd"), ("C:\\work\\a.jsonl", "a.jsonl"), ("", "file"), ("..", "file"),
        ("a/", "file"), ("\r\nSet-Cookie: x", "Set-Cookie: x"), ("\x1b[31mred", "[31mred"), ("漢字 🙂.jsonl", "漢字 🙂.jsonl"),
        ("x" * 999, "x" * 255), ("a\ud800b\u2028", "ab"), ("  a  ", "a"),
    ],
)  # fmt: skip
def test_names_are_cleaned(given: str, kept: str) -> None:
    assert clean_name(given) == kept


def test_a_file_without_an_end_does_not_expire() -> None:
    record = FileRecord(id="i", owner="", purpose="batch", filename="f", bytes=1, created_s=1, place="p")
    assert record.is_there(1e12)
    assert [FileRecord(**{**{n: getattr(record, n) for n in record.__struct_fields__}, "expires_s": 10}).is_there(s) for s in (9, 10)] == [
        True, False,
    ]  # fmt: skip
