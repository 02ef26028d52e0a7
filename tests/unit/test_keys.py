"""The key table is the only source of names: for Python, for Lua and for the reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.ids import new_request_id, pool_of
from pipeline.keys import SHARED, TABLE, PoolKeys, api_keys, api_keys_version, is_pool_name, lua_prelude


def test_the_readme_lists_every_key() -> None:
    text = (Path(__file__).parents[2] / "pipeline" / "README.md").read_text()
    rows = text.split("<!-- keys -->")[1].strip().splitlines()[2:]
    expected = [f"| `{{pool}}:{key.template}` | {key.kind} | {key.owner} | {key.life} |" for key in TABLE.values()]
    assert rows == expected


def test_the_readme_lists_what_belongs_to_no_pool() -> None:
    text = (Path(__file__).parents[2] / "pipeline" / "README.md").read_text()
    rows = text.split("<!-- shared keys -->")[1].strip().splitlines()[2:]
    assert rows == [f"| `{key.template}` | {key.kind} | {key.owner} | {key.life} |" for key in SHARED.values()]


def test_api_keys_are_no_pools_and_lie_on_one_node() -> None:
    tags = {key[1 : key.index("}")] for key in (api_keys(), api_keys_version())}
    assert len(tags) == 1
    assert not is_pool_name(tags.pop())


def test_lua_gets_a_function_for_every_key() -> None:
    prelude = lua_prelude()
    for name in TABLE:
        assert f"local function key_{name}(" in prelude


def test_every_script_says_its_keys_arguments_and_answers() -> None:
    folder = Path(__file__).parents[2] / "pipeline" / "scripts"
    scripts = sorted(path for path in folder.glob("*.lua") if not path.name.startswith("_"))
    assert len(scripts) >= 11
    for script in scripts:
        head = script.read_text().split("\nlocal")[0].split("\nredis")[0]
        for part in ("-- KEYS: ", "-- ARGV: ", "-- Answers: ", "-- Called twice: "):
            assert part in head, f"{script.name} does not open with {part!r}"


def test_all_keys_of_a_pool_share_its_hash_tag() -> None:
    keys = PoolKeys("tiny")
    for key in (keys.request("a"), keys.log("a", 0), keys.lane("prefill", "high"), keys.bus("api"), keys.worker("w")):
        assert key.startswith("{tiny}:")


def test_a_request_id_names_its_pool_and_is_never_the_same() -> None:
    ids = {new_request_id("baton-tiny") for _ in range(1000)}
    assert len(ids) == 1000
    assert {pool_of(request_id) for request_id in ids} == {"baton-tiny"}
    assert pool_of("short") == ""


@pytest.mark.parametrize(
    ("name", "good"), [("baton-tiny", True), ("a.b_c-9", True), ("", False), ("a{b}", False), ("a b", False)]
)
def test_pool_names(name: str, good: bool) -> None:
    assert is_pool_name(name) is good
