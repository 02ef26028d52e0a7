"""Reads the settings: `config.toml`, then `BATON_...` variables, then flags. The later one wins, key by key.

1. Each source is taken apart into single keys (`api.port`) with their values and where they came from.
2. Each key is looked up in the structs of `pipeline.config`; an unknown one is an error that names the nearest known one.
3. Each value is converted to the type of its field on its own, so an error names the key and the source.
4. What is left is put together to one frozen `Settings`.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from pipeline.config import PoolSettings, Section, Settings
from pipeline.errors import ConfigError
from pipeline.keys import is_pool_name

DEFAULT_FILE = Path("config.toml")
ENV_PREFIX = "BATON_"
ENV_FILE = "BATON_CONFIG"  # names the settings file
ENV_API_KEY = "BATON_API_KEY"  # what `baton chat` and `baton up` show the API; it and the file's name are no settings


class Key(NamedTuple):
    """One key of the schema: its dotted path, the type of its field and its default."""

    path: str
    type: Any
    default: Any

    @property
    def env(self) -> str:
        """The variable that sets it: `redis.url` is set by `BATON_REDIS_URL`."""
        return ENV_PREFIX + re.sub(r"[^A-Za-z0-9]", "_", self.path).upper()


class Value(NamedTuple):
    """A value of one key and where it came from."""

    value: Any
    source: str


def load_settings(path: Path | None, env: Mapping[str, str], overrides: Sequence[str]) -> Settings:
    """The settings of `path` (None: defaults), the variables in `env` and `overrides` ("api.port=8001").

    Raises ConfigError: the file cannot be read, a key is unknown, a value has the wrong type.
    """
    values = collect_values(path, env, overrides)
    return msgspec.convert(_nested(values), Settings)


def collect_values(path: Path | None, env: Mapping[str, str], overrides: Sequence[str]) -> dict[str, Value]:
    """Every key with the value that holds and its source, in the order of the schema; raises as `load_settings`."""
    set_values = _file_values(path) if path is not None else {}
    pools = _pool_names(set_values) or list(Settings().pools)
    set_values |= _env_values(env, pools)
    set_values |= _flag_values(overrides)
    pools += [name for name in _pool_names(set_values) if name not in pools]
    return {key.path: set_values.get(key.path, Value(key.default, "default")) for key in known_keys(pools)}


def known_keys(pools: Iterable[str]) -> list[Key]:
    """All keys of the schema, with one `[pools.<name>]` section for each of `pools`."""
    return list(_section_keys(Settings(), "", list(pools)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--config PATH` and `--set key=value`, which every process of Baton understands."""
    parser.add_argument("--config", type=Path, metavar="PATH", help=f"settings file (${ENV_FILE}, ./{DEFAULT_FILE})")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="one setting: api.port=8001"
    )


def settings_from(args: argparse.Namespace, env: Mapping[str, str]) -> Settings:
    """The settings that the arguments of `add_arguments` and `env` ask for; raises as `load_settings`."""
    return load_settings(settings_path(args.config, env), env, args.overrides)


def settings_path(flag: Path | None, env: Mapping[str, str]) -> Path | None:
    """The file to read: the flag, else $BATON_CONFIG, else ./config.toml where there is one."""
    if flag is not None:
        return flag
    if env.get(ENV_FILE):
        return Path(env[ENV_FILE])
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


def _section_keys(section: Section, prefix: str, pools: list[str]) -> Iterator[Key]:
    for field in msgspec.structs.fields(section):
        path, default = prefix + field.name, getattr(section, field.name)
        if path == "pools":
            for name in pools:
                yield from _section_keys(PoolSettings(), f"pools.{name}.", pools)
        elif isinstance(default, Section):
            yield from _section_keys(default, f"{path}.", pools)
        else:
            yield Key(path, field.type, default)


def _file_values(path: Path) -> dict[str, Value]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    names = list(_tables_of(tables.get("pools"), f"{path}: pools"))
    return _checked(_leaves(tables, "", known_keys(names)), names, str(path), strict=True)


def _leaves(table: Mapping[str, Any], prefix: str, known: list[Key]) -> Iterator[tuple[str, Any]]:
    """The keys of nested tables as dotted paths; a table is opened only where the schema has a section."""
    for name, value in table.items():
        path = prefix + name
        is_section = any(key.path.startswith(f"{path}.") for key in known)
        if isinstance(value, dict) and (is_section or path == "pools"):
            yield from _leaves(value, f"{path}.", known)
        else:
            yield path, value


def _tables_of(pools: Any, where: str) -> Iterable[str]:
    if pools is None:
        return []
    if not isinstance(pools, dict):
        raise ConfigError(f"{where}: expected tables [pools.<name>]")
    for name, table in pools.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{where}.{name}: expected a table [pools.{name}]")
    return pools


def _env_values(env: Mapping[str, str], pools: list[str]) -> dict[str, Value]:
    keys = {key.env: key for key in known_keys(pools)}
    values = {}
    for name, text in env.items():
        if not name.startswith(ENV_PREFIX) or name in (ENV_FILE, ENV_API_KEY):
            continue
        if name not in keys:
            raise ConfigError(f"environment: unknown variable {name}{nearest(name, keys)}")
        values[keys[name].path] = Value(_converted(keys[name], text, f"environment: {name}", strict=False), name)
    return values


def _flag_values(overrides: Sequence[str]) -> dict[str, Value]:
    pairs = []
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected KEY=VALUE, such as api.port=8001")
        pairs.append((path.strip(), value))
    names = [path.removeprefix("pools.").rpartition(".")[0] for path, _ in pairs if path.startswith("pools.")]
    return _checked(pairs, list(dict.fromkeys(names)), "--set", strict=False)


def _checked(pairs: Iterable[tuple[str, Any]], pools: list[str], source: str, *, strict: bool) -> dict[str, Value]:
    for name in pools:
        if not is_pool_name(name):
            raise ConfigError(f"{source}: pools.{name}: a pool's name is 1 to 64 letters, digits, dots, _ and -")
    keys = {key.path: key for key in known_keys(pools)}
    values = {}
    for path, value in pairs:
        if path not in keys:
            raise ConfigError(f"{source}: unknown key {path}{nearest(path, keys)}")
        values[path] = Value(_converted(keys[path], value, f"{source}: {path}", strict=strict), source)
    return values


def _converted(key: Key, value: Any, where: str, *, strict: bool) -> Any:
    """`value` as the field's type; text from variables and flags is read as the number or truth value it spells."""
    try:
        converted = msgspec.convert(value, key.type, strict=strict)
        if isinstance(converted, float) and not math.isfinite(converted):
            raise msgspec.ValidationError("not finite")
        return converted
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: expected {_type_words(key.type)}, got {value!r}") from error


def _type_words(type_: Any) -> str:
    if typing.get_origin(type_) is Literal:
        return "one of " + ", ".join(typing.get_args(type_))
    if typing.get_origin(type_) is Annotated:
        plain, meta = typing.get_args(type_)
        bounds = {"of at least": meta.ge, "above": meta.gt, "and at most": meta.le}
        return " ".join([_type_words(plain), *(f"{word} {b}" for word, b in bounds.items() if b is not None)])
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[type_]


def nearest(name: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown name: the known one that is most like it, if any is."""
    sections = {path.rpartition(".")[0] for path in known} - {""}
    if name in sections:
        return f": it is a section, [{name}]"
    near = difflib.get_close_matches(name, [*known, *sections], n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _pool_names(values: Mapping[str, Value]) -> list[str]:
    paths = [path.removeprefix("pools.").rpartition(".")[0] for path in values if path.startswith("pools.")]
    return list(dict.fromkeys(paths))


def _nested(values: Mapping[str, Value]) -> dict[str, Any]:
    tree: dict[str, Any] = {"pools": {}}
    for path, (value, _) in values.items():
        if path.startswith("pools."):
            name, _, field = path.removeprefix("pools.").rpartition(".")
            tree["pools"].setdefault(name, {})[field] = value
            continue
        *sections, field = path.split(".")
        table = tree
        for section in sections:
            table = table.setdefault(section, {})
        table[field] = value
    return tree
