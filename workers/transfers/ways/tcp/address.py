"""Where a process that exports listens, and what it tells others: from the settings and from where Redis is.

    transfer.tcp.host   listens on                       transfer.tcp.advertise   others are told
    set                 that                             set                      that
    empty               127.0.0.1 where Redis is here,   empty                    what is listened on; of 0.0.0.0 the address
                        else the address of this host                             from which Redis is reached
                        from which Redis is reached

All workers reach Redis, so the network that leads there is the one on which they are taken to reach each other.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import urlsplit

import msgspec

from pipeline.config import TransferSettings
from pipeline.errors import TransferError
from pipeline.sentinel_url import is_sentinel_url, parse_sentinel_url

LOOPBACK = "127.0.0.1"
REDIS_PORT = 6379
RESOLVE_LIMIT_S, RESOLVE_PAUSE_S = 30.0, 0.5  # the name of a Redis that starts beside this process is not known at once


async def with_addresses(settings: TransferSettings, redis_url: str) -> TransferSettings:
    """The settings with `tcp.host` and `tcp.advertise` filled in. Raises `TransferError` naming the one that must be set."""
    if settings.kind not in ("auto", "tcp"):
        return settings
    host, advertise = settings.tcp.host, settings.tcp.advertise
    if not host or (_is_wildcard(host) and not advertise):
        facing = await _facing(redis_servers(redis_url))
        if host and facing == LOOPBACK:
            raise TransferError(
                f"transfer.tcp.host = {host} listens on every address, and Redis, which is on this host, does not tell which "
                "of them others reach: set transfer.tcp.advertise"
            )
        host, advertise = host or facing, advertise or facing
    tcp = msgspec.structs.replace(settings.tcp, host=host, advertise=advertise or host)
    return msgspec.structs.replace(settings, tcp=tcp)


def redis_servers(url: str) -> list[tuple[str, int]]:
    """Hosts and ports of an address of Redis; none where it is a unix socket."""
    if is_sentinel_url(url):
        return list(parse_sentinel_url(url).sentinels)
    parts = urlsplit(url)
    return [(parts.hostname, parts.port or REDIS_PORT)] if parts.hostname and parts.scheme != "unix" else []


async def _facing(servers: list[tuple[str, int]]) -> str:
    """The address of this host from which the first of the servers that is known by name is reached."""
    try:
        async with asyncio.timeout(RESOLVE_LIMIT_S):
            while True:
                for host, port in servers:
                    if address := await asyncio.to_thread(local_address, host, port):
                        return address
                if not servers:
                    return LOOPBACK
                await asyncio.sleep(RESOLVE_PAUSE_S)
    except TimeoutError:
        names = ", ".join(host for host, _ in servers)
        raise TransferError(
            f"no way to Redis ({names}) is known, so neither is the address that others reach this host by: "
            "set transfer.tcp.host"
        ) from None


def local_address(host: str, port: int) -> str:
    """The address of this host that packets to `host` carry; empty where no way leads there. Sends nothing."""
    try:
        family, address = look_up(host, port)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            ours = str(probe.getsockname()[0])
    except OSError:
        return ""
    return LOOPBACK if ipaddress.ip_address(ours.partition("%")[0]).is_loopback else ours


def look_up(host: str, port: int, *, flags: int = 0) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """The first address behind a name, or the address that it is. Raises `OSError`, whatever the name is like."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)[0]
    except UnicodeError as error:
        raise OSError(f"{host!r} can be no name of a host") from error
    return family, (str(address[0]), int(address[1]))


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:  # a name
        return False
