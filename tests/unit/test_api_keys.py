"""What an API key is, and the decisions about it: values in, values out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest
import structlog
from starlette.datastructures import Headers

from api.guard import Caller, secret_of
from pipeline.api_keys import (
    PREFIX,
    ApiKey,
    check_exposure,
    digest_of,
    is_loopback,
    is_same,
    lane_for,
    needs_key,
    new_secret,
)
from pipeline.cli.keys import new_key, seconds_of, state_of
from pipeline.errors import ConfigError
from pipeline.key_store import KeysFile, read_keys_file

DIGEST = "ab" * 32


def key(**fields: object) -> ApiKey:
    return msgspec.convert({"name": "a", "digest": DIGEST, **fields}, ApiKey)


def test_a_secret_has_256_bits_and_is_never_the_same() -> None:
    secrets = {new_secret() for _ in range(1000)}
    assert len(secrets) == 1000
    assert all(secret.startswith(PREFIX) and len(secret) == len(PREFIX) + 43 for secret in secrets)


def test_what_is_kept_is_its_sha256() -> None:
    secret = new_secret()
    assert digest_of(secret) == hashlib.sha256(secret.encode()).hexdigest()
    assert is_same(digest_of(secret), digest_of(secret))
    assert not is_same(digest_of(secret), digest_of(secret + "x"))
    assert digest_of("\udcff\ud800")  # headers may be anything


def test_a_key_is_valid_until_it_is_revoked_or_expires() -> None:
    assert key().is_valid(1e12)
    assert key(expires_s=100).is_valid(99.9)
    assert not key(expires_s=100).is_valid(100)
    assert not key(revoked_s=5).is_valid(1)
    assert [state_of(each, 50) for each in (key(), key(expires_s=50), key(revoked_s=1, expires_s=2))] == [
        "valid", "expired", "revoked",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "asked", "lane"),
    [
        ({}, None, "default"),
        ({}, "high", "high"),
        ({"lane": "low"}, None, "low"),
        ({"lane": "low"}, "high", "high"),
        ({"best_lane": "default"}, "high", "default"),
        ({"best_lane": "default"}, "low", "low"),
        ({"lane": "low", "best_lane": "low"}, "default", "low"),
        ({"lane": "high", "best_lane": "low"}, None, "low"),
    ],
)
def test_the_lane_of_a_request(fields: dict[str, str], asked: str | None, lane: str) -> None:
    assert lane_for(key(**fields), asked) == lane


def test_without_a_key_the_lane_is_the_one_that_is_asked_for() -> None:
    assert [lane_for(None, asked) for asked in (None, "high", "low")] == ["default", "high", "low"]


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("", False), ("example.org", False), ("localhost.evil", False),
    ],
)  # fmt: skip
def test_what_a_loopback_address_is(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("mode", "host", "has_keys", "needed", "refuses_to_start"),
    [
        ("auto", "127.0.0.1", False, False, False),
        ("auto", "127.0.0.1", True, True, False),
        ("auto", "0.0.0.0", False, True, True),
        ("auto", "0.0.0.0", True, True, False),
        ("required", "127.0.0.1", False, True, False),
        ("required", "0.0.0.0", False, True, False),
        ("off", "0.0.0.0", True, False, False),
        ("off", "127.0.0.1", True, False, False),
    ],
)
def test_when_a_key_is_needed(mode: str, host: str, has_keys: bool, needed: bool, refuses_to_start: bool) -> None:
    assert needs_key(mode, host, has_keys=has_keys) is needed  # type: ignore[arg-type]
    if refuses_to_start:
        with pytest.raises(ConfigError, match="baton keys create"):
            check_exposure(mode, host, has_keys=has_keys)  # type: ignore[arg-type]
    else:
        check_exposure(mode, host, has_keys=has_keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("headers", "secret"),
    [
        ({}, None),
        ({"authorization": "Bearer abc"}, "abc"),
        ({"authorization": "bearer  abc "}, "abc"),
        ({"x-api-key": "abc"}, "abc"),
        ({"authorization": "Bearer abc", "x-api-key": "other"}, "abc"),
        ({"authorization": "Basic abc"}, None),
        ({"authorization": "abc"}, None),
        ({"authorization": "Bearer"}, ""),
    ],
)
def test_where_a_key_is_shown(headers: dict[str, str], secret: str | None) -> None:
    assert secret_of(Headers(headers)) == secret


def test_scopes_and_models_of_a_caller() -> None:
    narrow = Caller(key(models=["small"]))
    assert (narrow.may_use("small"), narrow.may_use("large")) == (True, False)
    assert (narrow.has_one_of(("inference",)), narrow.has_one_of(("admin",))) == (True, False)
    assert narrow.has_one_of(("inference", "admin"))
    assert Caller(key()).may_use("large")
    assert Caller().may_use("large")
    assert Caller().has_one_of(("admin",))
    assert Caller().owner == ""


def test_a_keys_file_is_read_and_what_is_wrong_is_named(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[team]\ndigest = "{DIGEST}"\nrequests_per_minute = 5\nscopes = ["admin"]\n')
    (read,) = read_keys_file(str(file))
    assert (read.name, read.requests_per_minute, read.scopes) == ("team", 5, ("admin",))
    assert read_keys_file("") == []
    for wrong, said in (
        ('[team]\ndigest = "short"', "digest"),
        (f'[team]\ndigest = "{DIGEST}"\nlimit = 3', "limit"),
        (f'[team]\ndigest = "{DIGEST}"\nscopes = ["all"]', "scopes"),
        ("team = 3", "expected a table"),
        ("[", "is not TOML"),
    ):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=said):
            read_keys_file(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys_file(str(tmp_path / "none.toml"))


def test_a_file_that_becomes_wrong_keeps_its_keys_until_it_is_right_again(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[team]\ndigest = "{DIGEST}"\n')
    file = KeysFile(str(path))
    with structlog.testing.capture_logs() as lines:
        file.look()
        for _ in range(2):
            path.write_text("[team")
            file.look()
        path.unlink()
        file.look()
        file.look()
        assert list(file.keys) == [DIGEST]
        path.write_text("")
        file.look()
        file.look()
    assert file.keys == {}
    assert [line["log_level"] for line in lines if line["log_level"] != "info"] == ["error"] * 2  # each once
    assert "is not TOML" in lines[0]["error"]
    assert "cannot be read" in lines[1]["error"]


def test_a_file_of_keys_has_to_be_right_at_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        KeysFile(str(tmp_path / "none.toml"))
    none = KeysFile("")
    none.look()
    assert none.keys == {}


def test_a_new_key_keeps_no_secret() -> None:
    made = new_key("team-a", expires_in="2h", scopes=["admin"], models=["m"])
    assert made.secret not in str(msgspec.to_builtins(made.key))
    assert made.key.digest == digest_of(made.secret)
    assert made.secret.startswith(made.key.shown)
    assert made.key.expires_s - made.key.created_s == 7200
    with pytest.raises(ConfigError, match="cannot be a key's name"):
        new_key("a b", expires_in=None)


@pytest.mark.parametrize("text", ["", "90", "d", "0d", "-1d", "1.5h", "9y", "1d2h"])
def test_a_time_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 90d"):
        seconds_of(text)
