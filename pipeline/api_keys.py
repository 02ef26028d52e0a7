"""API keys: what one may do, and how it is known again.

A key is 256 random bits, shown once and kept as its SHA-256: who reads Redis or the keys file cannot use what stands there. A slow
hash (bcrypt, argon2) protects secrets that people choose and that can be guessed; nobody guesses 256 bits, and a slow hash would
cost each request milliseconds.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pipeline.errors import ConfigError

PREFIX = "baton-sk-"
SHOWN_CHARACTERS = len(PREFIX) + 4  # of a key, so that its owner knows it again in a list

INFERENCE, ADMIN = "inference", "admin"
Scope = Literal["inference", "admin"]
Lane = Literal["high", "default", "low"]
LANES_BEST_FIRST: tuple[Lane, ...] = ("high", "default", "low")
AuthMode = Literal["auto", "required", "off"]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
Amount = Annotated[int, Meta(ge=0)]


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key as it is kept. 0 is no limit, no end; `models` empty: all."""

    name: Name
    digest: Digest  # SHA-256 of the key
    shown: str = ""  # how it begins
    created_s: Amount = 0  # these three in seconds since 1970
    expires_s: Amount = 0
    revoked_s: Amount = 0
    scopes: tuple[Scope, ...] = (INFERENCE,)  # type: ignore[assignment]
    models: tuple[str, ...] = ()  # pools and adapters, by the names in /v1/models
    lane: Lane = "default"  # of requests that name neither priority nor service tier
    best_lane: Lane = "high"  # a request that asks for a better one gets this
    requests_per_minute: Amount = 0
    tokens_per_minute: Amount = 0
    concurrent_requests: Amount = 0  # waiting and running, in each pool

    @property
    def id(self) -> str:
        """The same wherever the key is kept; it is the owner of the requests that the key makes."""
        return f"key-{self.digest[:16]}"

    def is_valid(self, now_s: float) -> bool:
        """Whether it is neither revoked nor past its end."""
        return not self.revoked_s and not (self.expires_s and self.expires_s <= now_s)

    def may_use(self, model: str) -> bool:
        """Whether it may ask for a model."""
        return not self.models or model in self.models


def new_secret() -> str:
    """A key: `baton-sk-` and 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> str:
    """What is kept of a key. Text of any kind: it comes from strangers."""
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def is_same(digest: str, other: str) -> bool:
    """Whether two digests are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(digest, other)


def lane_for(key: ApiKey | None, asked: str | None) -> str:
    """The lane of a request: what it asks for, at most the key's best one, else the key's own. `asked` None: it says nothing."""
    if key is None:
        return asked or "default"
    wanted = asked or key.lane
    allowed = LANES_BEST_FIRST[LANES_BEST_FIRST.index(key.best_lane) :]
    return wanted if wanted in allowed else key.best_lane


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach an address. A name other than `localhost` may mean anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def needs_key(mode: AuthMode, host: str, *, has_keys: bool) -> bool:
    """Whether a request without a valid key is refused. `auto`: as soon as there is a key, and where others reach the address."""
    return mode == "required" or (mode == "auto" and (has_keys or not is_loopback(host)))


def check_exposure(mode: AuthMode, host: str, *, has_keys: bool) -> None:
    """Raises ConfigError where a server would listen for others and nobody had said who may ask it."""
    if mode == "auto" and not has_keys and not is_loopback(host):
        raise ConfigError(
            f"api.host is {host!r}, which other machines reach, and there is no API key: make one with `baton keys create NAME` "
            "(or name a file of them in api.keys_file); api.auth = 'required' starts without one and refuses everybody until "
            "there is one, 'off' lets everybody in"
        )
