"""`baton config`: what the settings are and where they come from; the router's can be changed while Baton runs."""

from __future__ import annotations

import json
import shlex
from typing import Any

import msgspec

from pipeline.cli.options import Given
from pipeline.cli.pools import connected
from pipeline.config import RouterSettings, Settings
from pipeline.connection import Connection
from pipeline.errors import ConfigError
from pipeline.keys import PoolKeys
from pipeline.settings_file import Key, Value, known_keys, nearest
from pipeline.snapshot import set_router, take_snapshot
from pipeline.wording import without_passwords

SECRETS = ("files.storage_options", "batches.webhook_secret")  # settings that are not shown


def show_settings(source: Given, *, as_json: bool) -> None:
    """Every key as a line of TOML with its source."""
    values = {path: _masked(path, value) for path, value in source.values().items()}
    if as_json:
        print(json.dumps({path: value._asdict() for path, value in values.items()}))
        return
    lines = [f"{_toml_path(path)} = {json.dumps(value)}" for path, (value, _) in values.items()]
    width = max(len(line) for line in lines)
    for line, (_, origin) in zip(lines, values.values(), strict=True):
        print(f"{line:<{width}}  # {origin}")


def get_setting(source: Given, key: str, *, as_json: bool) -> None:
    """One value, bare; raises ConfigError for an unknown key."""
    values = source.values()
    if key not in values:
        raise ConfigError(f"unknown key {key}{nearest(key, values)}")
    value = values[key].value
    print(json.dumps(value) if as_json or isinstance(value, bool) else value)


def show_variables(source: Given, *, as_json: bool) -> None:
    """Every variable, as a line of a shell or as one object."""
    values = source.values()
    variables = {key.env: _masked(key.path, values[key.path]).value for key in _keys(source.settings())}
    if as_json:
        print(json.dumps(variables))
        return
    for name, value in variables.items():
        print(f"{name}={shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))}")


async def change_router(source: Given, pool: str | None, changes: dict[str, int], *, as_json: bool) -> None:
    """Writes `changes` for one pool or all, then prints what holds; running APIs follow at once."""
    async with connected(source, pool) as place:
        routers = {name: await _change(place.connection, name, place.settings.router, changes) for name in place.pools}
    if as_json:
        print(json.dumps(msgspec.to_builtins(routers)))
        return
    for name, router in routers.items():
        for key, value in msgspec.structs.asdict(router).items():
            print(f"{name} {key} = {value}")


async def _change(
    connection: Connection, pool: str, initial: RouterSettings, changes: dict[str, int]
) -> RouterSettings:
    keys = PoolKeys(pool)
    if changes:
        await set_router(connection, keys, changes)
    return (await take_snapshot(connection, keys)).router(initial)


def _keys(settings: Settings) -> list[Key]:
    return known_keys(settings.pools)


def _toml_path(path: str) -> str:
    """A pool's name may hold dots; TOML wants it quoted then."""
    if not path.startswith("pools."):
        return path
    name, _, field = path.removeprefix("pools.").rpartition(".")
    return f'pools."{name}".{field}' if "." in name else path


def _masked(path: str, value: Value) -> Value:
    """The value without the passwords that it may carry."""
    text: Any = value.value
    if path in SECRETS and text:
        return value._replace(value="***")
    if not isinstance(text, str) or "://" not in text:
        return value
    return value._replace(value=without_passwords(text))
