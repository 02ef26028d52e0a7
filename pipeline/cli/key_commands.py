"""The commands of `baton keys` and their options."""

from __future__ import annotations

import asyncio
import enum
from typing import Annotated

import typer

from pipeline.api_keys import ADMIN, INFERENCE
from pipeline.cli.options import ConfigOption, JsonOption, SetOption, given

LimitOption = Annotated[int, typer.Option(min=0, help="0: no limit.")]


class ScopeName(enum.StrEnum):
    """What a key may open."""

    INFERENCE = INFERENCE
    ADMIN = ADMIN


class LaneName(enum.StrEnum):
    """The lanes of a queue."""

    HIGH = "high"
    DEFAULT = "default"
    LOW = "low"


def add_key_commands(app: typer.Typer) -> None:
    """Adds them to the command line."""
    keys = typer.Typer(help="Make, list and revoke the API keys of the HTTP API.", no_args_is_help=True)
    keys.command("create")(create)
    keys.command("list")(list_all)
    keys.command("revoke")(revoke)
    app.add_typer(keys, name="keys")


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")],
    scope: Annotated[
        list[ScopeName] | None, typer.Option(help="What it opens, repeatable; inference alone if left out.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model it may ask for, repeatable; all if left out.")
    ] = None,
    lane: Annotated[LaneName, typer.Option(help="Lane of requests that name none.")] = LaneName.DEFAULT,
    best_lane: Annotated[LaneName, typer.Option(help="The best lane its requests may ask for.")] = LaneName.HIGH,
    requests_per_minute: LimitOption = 0,
    tokens_per_minute: LimitOption = 0,
    concurrent_requests: LimitOption = 0,
    expires_in: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long it is valid: 90d, 12h, 30m; for ever if left out.")
    ] = None,
    to_file: Annotated[bool, typer.Option("--file", help="Store nothing: print a table for api.keys_file.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Make a key and print it; it is shown this once, and kept as its digest."""
    from pipeline.cli.keys import create_key, new_key

    made = new_key(
        name, expires_in=expires_in, scopes=[each.value for each in scope or (ScopeName.INFERENCE,)],
        models=model or [], lane=lane.value, best_lane=best_lane.value, requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute, concurrent_requests=concurrent_requests,
    )  # fmt: skip
    asyncio.run(create_key(given(config, overrides), made, to_file=to_file, in_json=as_json))


def list_all(as_json: JsonOption = False, config: ConfigOption = None, overrides: SetOption = None) -> None:
    """List the keys, those of api.keys_file and those that were revoked or have expired, too."""
    from pipeline.cli.keys import list_keys

    asyncio.run(list_keys(given(config, overrides), in_json=as_json))


def revoke(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names or ids of `baton keys list`.")],
    as_json: JsonOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Make keys invalid for good, within api.keys_refresh_s on every server. What they have running goes on."""
    from pipeline.cli.keys import revoke_keys

    raise typer.Exit(asyncio.run(revoke_keys(given(config, overrides), names, in_json=as_json)))
