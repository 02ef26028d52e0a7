"""Addresses of a Redis behind Sentinels."""

from __future__ import annotations

import pytest

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.errors import ConfigError
from pipeline.sentinel_url import SentinelUrl, is_sentinel_url, parse_sentinel_url


def test_all_parts_are_read() -> None:
    url = "rediss+sentinel://me:p%40ss@one:26380,two,[::1]:26381/my%2Fmaster/3?sentinel_username=s&sentinel_password=t"
    assert parse_sentinel_url(url) == SentinelUrl(
        sentinels=(("one", 26380), ("two", 26379), ("::1", 26381)), master="my/master", db=3, username="me",
        password="p@ss", sentinel_username="s", sentinel_password="t", is_tls=True,
    )  # fmt: skip


def test_little_is_enough() -> None:
    assert parse_sentinel_url("redis+sentinel://one/mymaster") == SentinelUrl((("one", 26379),), "mymaster")
    assert parse_sentinel_url("redis+sentinel://:secret@one/mymaster").password == "secret"
    assert not is_sentinel_url("redis://one:6379/0")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis+sentinel://me:secret@one:26379", "the name of the master is missing"),
        ("redis+sentinel://me:secret@/mymaster", "a Sentinel without a host"),
        ("redis+sentinel://me:secret@one,/mymaster", "a Sentinel without a host"),
        ("redis+sentinel://me:secret@one:port/mymaster", "the port of the Sentinel one is no number of 1 to 65535"),
        ("redis+sentinel://me:secret@one:70000/mymaster", "the port of the Sentinel one is no number of 1 to 65535"),
        ("redis+sentinel://me:secret@one/mymaster/db", "the database behind the master's name is no number"),
        ("redis+sentinel://me:secret@one/mymaster?timeout=1", "unknown parameter 'timeout'"),
        ("redis+sentinel://me:secret@[one/mymaster", "no address"),
    ],
)
def test_what_is_wrong_is_said_with_the_right_form_and_without_the_password(url: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        Connection(RedisSettings(url=url))
    assert str(error.value).startswith(f"redis.url: {text}")
    assert "redis+sentinel://[user:password@]host:26379,host2:26379/mymaster[/db]" in str(error.value)
    assert "secret" not in str(error.value)
