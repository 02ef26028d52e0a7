"""`baton keys`: who may use the HTTP API, and how much."""

from __future__ import annotations

import datetime
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from pipeline.api_keys import SHOWN_CHARACTERS, ApiKey, digest_of, new_secret
from pipeline.cli.options import Given
from pipeline.cli.pools import connected
from pipeline.cli.replies import as_json, as_text
from pipeline.control import Answer
from pipeline.errors import BatonError, ConfigError, RedisUnavailable
from pipeline.exits import Exit
from pipeline.key_store import KeyStore, read_keys_file

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class MadeKey(NamedTuple):
    """A new key and the only copy of its secret."""

    key: ApiKey
    secret: str


def new_key(name: str, *, expires_in: str | None, **fields: Any) -> MadeKey:
    """Raises ConfigError for a name or time that is none."""
    secret, now_s = new_secret(), int(time.time())
    expires_s = now_s + seconds_of(expires_in) if expires_in else 0
    made = {"name": name, "digest": digest_of(secret), "shown": secret[:SHOWN_CHARACTERS], "created_s": now_s}
    try:
        return MadeKey(msgspec.convert({**made, "expires_s": expires_s, **fields}, ApiKey), secret)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{name!r} cannot be a key's name: it is 1 to 64 letters, digits, dots, _, @ and -, and begins with a letter or digit"
        ) from error


def seconds_of(text: str) -> int:
    """`90d`, `12h`, `30m`, `20s`. Raises ConfigError."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text)
    if match is None:
        raise ConfigError(f"--expires-in {text}: expected a number and s, m, h or d, such as 90d")
    return int(match[1]) * _SECONDS[match[2]]


async def create_key(source: Given, made: MadeKey, *, to_file: bool, in_json: bool) -> None:
    """Keep the key, or print what a keys file holds of it. Raises ConfigError where a valid key has the name already."""
    if not to_file:
        async with connected(source, None) as place:
            store = KeyStore(place.connection)
            _check_free(
                made.key.name, [*(await store.read()).keys.values(), *read_keys_file(place.settings.api.keys_file)]
            )
            await store.put(made.key)
    if in_json:
        print(json.dumps({"key": made.secret, **_row(made.key, "file" if to_file else "redis")}))
    elif to_file:
        print(f"# the key itself, shown this once: {made.secret}")
        print("\n".join(_table(made.key)))
    else:
        print(made.secret)


def _check_free(name: str, keys: Sequence[ApiKey]) -> None:
    if any(key.name == name and key.is_valid(time.time()) for key in keys):
        raise ConfigError(f"a valid key is named {name} already: revoke it first, or choose another name")


async def list_keys(source: Given, *, in_json: bool) -> None:
    """One line a key, the oldest first."""
    async with connected(source, None) as place:
        kept = (await KeyStore(place.connection).read()).keys.values()
        rows = [_row(key, "redis") for key in sorted(kept, key=lambda key: key.created_s)]
        rows += [_row(key, "file") for key in read_keys_file(place.settings.api.keys_file)]
    if in_json:
        print(json.dumps(rows))
        return
    if not rows:
        print("- empty -")
    for row in rows:
        print(_line(row))


async def revoke_keys(source: Given, names: Sequence[str], *, in_json: bool) -> Exit:
    """One answer a key; what fails for one does not keep the others from being tried."""
    answers: dict[str, Answer] = {}
    async with connected(source, None) as place:
        in_file = {key.name for key in read_keys_file(place.settings.api.keys_file)}
        store = KeyStore(place.connection)
        for name in names:
            try:
                key = await store.find(name)
                if not key.revoked_s:
                    await store.put(msgspec.structs.replace(key, revoked_s=int(time.time())))
                answers[name] = Answer(name, {"revoked": key.id} if in_json else f"revoked ({key.id})")
            except RedisUnavailable:
                raise
            except BatonError as error:
                text = (
                    f"it stands in {place.settings.api.keys_file}: take it out there" if name in in_file else str(error)
                )
                answers[name] = Answer(name, error=text.removeprefix(f"{name}: "))
    print(as_json(answers) if in_json else as_text(answers))
    return Exit.FAILED if any(answer.error for answer in answers.values()) else Exit.OK


def _row(key: ApiKey, kept_in: str) -> dict[str, Any]:
    """A key for programs: every field but the digest."""
    fields = {name: getattr(key, name) for name in key.__struct_fields__ if name != "digest"}
    return {"id": key.id, "state": state_of(key, time.time()), "kept_in": kept_in, **fields}


def state_of(key: ApiKey, now_s: float) -> str:
    """In a word."""
    return "revoked" if key.revoked_s else "valid" if key.is_valid(now_s) else "expired"


def _line(row: dict[str, Any]) -> str:
    limits = [
        f"{row[field]} {word}"
        for field, word in (
            ("requests_per_minute", "requests/min"), ("tokens_per_minute", "tokens/min"), ("concurrent_requests", "at once")
        )
        if row[field]
    ]  # fmt: skip
    lanes = row["lane"] if row["best_lane"] == "high" else f"{row['lane']}, at most {row['best_lane']}"
    parts = [
        ", ".join(row["scopes"]), f"models: {', '.join(row['models']) or 'all'}", f"lane: {lanes}", ", ".join(limits) or "no limits"
    ]  # fmt: skip
    if row["expires_s"]:
        parts.append(f"until {_time(row['expires_s'])}")
    if row["kept_in"] == "file":
        parts.append("of api.keys_file")
    shown = f"{row['shown']}…" if row["shown"] else ""
    return f"{row['state']:<8} {row['name']:<16} {row['id']} {shown:<14} {'; '.join(parts)}"


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(math.floor(seconds), datetime.UTC).isoformat(sep=" ", timespec="minutes")


def _table(key: ApiKey) -> Iterator[str]:
    """The key as a table of a keys file: what differs from the defaults."""
    name = f'"{key.name}"' if re.search(r"[.@]", key.name) else key.name
    yield f"[{name}]"
    for field, value in msgspec.to_builtins(key).items():
        if field != "name":
            yield f"{field} = {json.dumps(value)}"
