"""Where a process that exports listens, and what others are told: the settings, and where Redis is."""

from __future__ import annotations

import pytest

from pipeline.config import TcpSettings, TransferSettings
from pipeline.errors import TransferError
from workers.transfers.ways.tcp import address
from workers.transfers.ways.tcp.address import local_address, redis_servers, with_addresses


async def addresses(redis_url: str, **tcp: str) -> tuple[str, str]:
    """Listened on, advertised."""
    found = (await with_addresses(TransferSettings(tcp=TcpSettings(**tcp)), redis_url)).tcp
    return found.host, found.advertise


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        ("", []),
        ("unix:///run/redis.sock", []),
        ("redis://", []),
        ("redis://me:secret@cache/0", [("cache", 6379)]),
        ("rediss://cache:7000", [("cache", 7000)]),
        ("redis://[::1]:7000", [("::1", 7000)]),
        ("redis+sentinel://a:1,b/mymaster", [("a", 1), ("b", 26379)]),
    ],
)
def test_where_redis_is(url: str, servers: list[tuple[str, int]]):
    assert redis_servers(url) == servers


@pytest.mark.parametrize("url", ["unix:///run/redis.sock", "redis://127.0.0.1:6379/0", "redis://localhost", ""])
async def test_with_redis_on_this_host_only_this_host_is_served(url: str):
    assert await addresses(url) == ("127.0.0.1", "127.0.0.1")
    assert await addresses(url, host="10.0.0.7") == ("10.0.0.7", "10.0.0.7")
    assert await addresses(url, advertise="10.0.0.7") == ("127.0.0.1", "10.0.0.7")
    assert await addresses(url, host="0.0.0.0", advertise="node-7") == ("0.0.0.0", "node-7")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_every_address_is_none_that_others_can_be_told(host: str):
    with pytest.raises(TransferError, match=r"set transfer.tcp.advertise"):
        await addresses("unix:///run/redis.sock", host=host)


async def test_with_redis_elsewhere_the_address_that_faces_it():
    ours = local_address("203.0.113.7", 6379)
    if not ours:
        pytest.skip("no route leads out of here")
    url = "redis://203.0.113.7:6379/0"
    assert ours != "127.0.0.1"
    assert await addresses(url) == (ours, ours)
    assert await addresses(url, host="0.0.0.0") == ("0.0.0.0", ours)
    assert await addresses(f"redis+sentinel://{'x' * 100}:1,203.0.113.7:1/mymaster") == (ours, ours)


async def test_a_name_that_stays_unknown_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(address, "RESOLVE_LIMIT_S", 0.05)
    with pytest.raises(TransferError, match=r"Redis \(x{100}\).*set transfer.tcp.host"):
        await addresses(f"redis://{'x' * 100}:6379")
    assert await addresses(f"redis://{'x' * 100}:6379", host="10.0.0.7") == ("10.0.0.7", "10.0.0.7")


async def test_where_tcp_is_not_used_nothing_is_looked_up():
    settings = TransferSettings(kind="shm")
    assert await with_addresses(settings, "redis://no-such-host.invalid") is settings
    both = TransferSettings(tcp=TcpSettings(host="10.0.0.7", advertise="node-7"))
    assert await with_addresses(both, "redis://no-such-host.invalid") == both
