"""Addresses of a Redis behind Sentinels: `redis+sentinel://[user:password@]host:26379,host2:26379/mymaster[/db]`.

User and password are those of Redis; those of the Sentinels, where they have any, are the parameters `sentinel_username` and
`sentinel_password`. `rediss+sentinel://` speaks TLS to both.
"""

from __future__ import annotations

import dataclasses
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from pipeline.errors import ConfigError

SCHEMES = ("redis+sentinel", "rediss+sentinel")
FORM = "redis+sentinel://[user:password@]host:26379,host2:26379/mymaster[/db]"
_DEFAULT_PORT = 26379
_PARAMETERS = ("sentinel_username", "sentinel_password")


@dataclasses.dataclass(frozen=True, slots=True)
class SentinelUrl:
    """Who is asked for the master, its name there, and how it is spoken to."""

    sentinels: tuple[tuple[str, int], ...]
    master: str
    db: int = 0
    username: str | None = None
    password: str | None = dataclasses.field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = dataclasses.field(default=None, repr=False)
    is_tls: bool = False


def is_sentinel_url(url: str) -> bool:
    """Whether an address names Sentinels instead of a server."""
    return url.partition("://")[0].lower() in SCHEMES


def parse_sentinel_url(url: str) -> SentinelUrl:
    """The parts of such an address. Raises ConfigError, which never holds a password."""
    try:
        parts = urlsplit(url)
    except ValueError:  # its text may hold a part of the password
        raise ConfigError(f"redis.url: no address; expected {FORM}") from None
    try:
        login, _, hosts = parts.netloc.rpartition("@")
        user, has_password, password = login.partition(":")
        master, _, db = parts.path.strip("/").partition("/")
        return SentinelUrl(
            sentinels=tuple(_host_and_port(host) for host in hosts.split(",")),
            master=_master(unquote(master)),
            db=_db(db),
            username=unquote(user) or None,
            password=unquote(password) if has_password else None,
            is_tls=parts.scheme == "rediss+sentinel",
            **_parameters(parts),
        )
    except ValueError as error:
        raise ConfigError(f"redis.url: {error}; expected {FORM}") from None


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if ":" in text.rpartition("]")[2] else (text, "", "")
    host = host.strip("[]")
    if not host:
        raise ValueError("a Sentinel without a host")
    if not port:
        return host, _DEFAULT_PORT
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"the port of the Sentinel {host} is no number of 1 to 65535")
    return host, int(port)


def _master(name: str) -> str:
    if not name:
        raise ValueError("the name of the master is missing")
    return name


def _db(text: str) -> int:
    if text and not (text.isascii() and text.isdigit()):
        raise ValueError("the database behind the master's name is no number")
    return int(text or 0)


def _parameters(parts: SplitResult) -> dict[str, str]:
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(given.keys() - set(_PARAMETERS)):
        raise ValueError(f"unknown parameter {unknown[0]!r} (known: {', '.join(_PARAMETERS)})")
    return given
