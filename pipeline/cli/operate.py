"""The commands of an operator and their options: names and shapes are Celery's where Celery has them."""

from __future__ import annotations

import asyncio
import enum
from typing import Annotated, NoReturn

import typer

from pipeline.cli.options import ConfigOption, JsonOption, SetOption, given
from pipeline.errors import ConfigError
from pipeline.exits import Exit

PoolOption = Annotated[str | None, typer.Option("--pool", help="One pool; all of them if left out.")]
ToOption = Annotated[
    list[str] | None,
    typer.Option("-d", "--destination", metavar="NODE", help="Only these workers: repeatable, or separated by commas."),
]
TimeoutOption = Annotated[float, typer.Option("-t", "--timeout", min=0.0, help="Longest wait for replies in seconds.")]
IdsArgument = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Request ids.")]
AllOption = Annotated[bool, typer.Option("--all", help="All dead letters of the pool.")]
ForceOption = Annotated[bool, typer.Option("-f", "--force", help="Do not ask.")]


class Inspected(enum.StrEnum):
    """What `baton inspect` shows."""

    PING = "ping"
    ACTIVE = "active"
    RESERVED = "reserved"
    STATS = "stats"
    QUEUES = "queues"
    REGISTERED = "registered"
    DEAD = "dead"
    QUERY_TASK = "query_task"


class Order(enum.StrEnum):
    """What `baton control` does."""

    PING = "ping"
    REVOKE = "revoke"
    PAUSE = "pause"
    RESUME = "resume"
    DRAIN = "drain"
    SHUTDOWN = "shutdown"


def add_operators_commands(app: typer.Typer) -> None:
    """Adds them to the command line."""
    for command in (status, inspect, control, purge, events):
        app.command()(command)
    dead = typer.Typer(help="Look at dead-lettered requests, try them again, forget them.", no_args_is_help=True)
    for name, subcommand in (("list", dead_list), ("show", dead_show), ("replay", dead_replay), ("drop", dead_drop)):
        dead.command(name)(subcommand)
    app.add_typer(dead, name="dead")


def status(
    destination: ToOption = None, timeout: TimeoutOption = 1.0, pool: PoolOption = None, as_json: JsonOption = False,
    config: ConfigOption = None, overrides: SetOption = None,
) -> None:  # fmt: skip
    """Show the workers that are online. Exits with 69 when none replies."""
    from pipeline.cli.remote import Whom, ask_status

    whom = Whom(pool, _names(destination), timeout)
    _finish(asyncio.run(ask_status(given(config, overrides), whom, json=as_json)))


def inspect(
    action: Annotated[Inspected, typer.Argument(help="What to show.")],
    ids: IdsArgument = None,
    destination: ToOption = None,
    timeout: TimeoutOption = 1.0,
    pool: PoolOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Ask workers what they do; `queues`, `dead` and `query_task ID` are read from Redis and need no worker."""
    from pipeline.cli.dead import list_dead
    from pipeline.cli.remote import Whom, ask_workers
    from pipeline.cli.requests import query_tasks, show_lanes

    source, whom = given(config, overrides), Whom(pool, _names(destination), timeout)
    _check_ids(action, ids, needed=action is Inspected.QUERY_TASK)
    match action:
        case Inspected.QUERY_TASK:
            _finish(asyncio.run(query_tasks(source, ids or [], in_json=as_json)))
        case Inspected.QUEUES:
            _finish(asyncio.run(show_lanes(source, pool, whom.to, in_json=as_json)))
        case Inspected.DEAD:
            _finish(asyncio.run(list_dead(source, pool, 100, in_json=as_json)))
        case _:
            _finish(asyncio.run(ask_workers(source, whom, action.value, json=as_json, counted=True)))


def control(
    action: Annotated[Order, typer.Argument(help="What to do.")],
    ids: IdsArgument = None,
    destination: ToOption = None,
    timeout: TimeoutOption = 1.0,
    pool: PoolOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Tell workers what to do, all of them or those named; `revoke ID` ends a request wherever it is."""
    from pipeline.cli.remote import Whom, ask_workers
    from pipeline.cli.requests import revoke

    source = given(config, overrides)
    _check_ids(action, ids, needed=action is Order.REVOKE)
    if action is Order.REVOKE:
        _finish(asyncio.run(revoke(source, ids or [], in_json=as_json)))
    whom = Whom(pool, _names(destination), timeout)
    _finish(asyncio.run(ask_workers(source, whom, action.value, json=as_json, counted=False)))


def purge(
    stage: Annotated[str | None, typer.Option(help="Only this stage: prefill, decode or one of your own.")] = None,
    lane: Annotated[str | None, typer.Option(help="Only this lane: high, default, low or @worker.")] = None,
    force: ForceOption = False,
    pool: PoolOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """End all requests that wait now, as cancelled. What runs goes on."""
    from pipeline.cli.requests import purge as run_purge

    _finish(asyncio.run(run_purge(given(config, overrides), pool, stage, lane, force=force, in_json=as_json)))


def events(
    dump: Annotated[bool, typer.Option("--dump", "-d", help="As Celery has it; events are always dumped.")] = True,
    pool: PoolOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Print what happens to tasks and workers, one line an event, until Ctrl-C."""
    from pipeline.cli.events import dump_events

    asyncio.run(dump_events(given(config, overrides), pool, in_json=as_json))


def dead_list(
    limit: Annotated[int, typer.Option(min=1, help="How many of each pool, the newest first.")] = 100,
    pool: PoolOption = None, as_json: JsonOption = False, config: ConfigOption = None, overrides: SetOption = None,
) -> None:  # fmt: skip
    """List dead-lettered requests, the newest first."""
    from pipeline.cli.dead import list_dead

    _finish(asyncio.run(list_dead(given(config, overrides), pool, limit, in_json=as_json)))


def dead_show(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="A request id.")],
    as_json: JsonOption = False, config: ConfigOption = None, overrides: SetOption = None,
) -> None:  # fmt: skip
    """Show one: why it died, where it stood, what was asked for."""
    from pipeline.cli.dead import show_dead

    _finish(asyncio.run(show_dead(given(config, overrides), request_id, in_json=as_json)))


def dead_replay(
    ids: IdsArgument = None, everything: AllOption = False, pool: PoolOption = None, as_json: JsonOption = False,
    config: ConfigOption = None, overrides: SetOption = None,
) -> None:  # fmt: skip
    """Make a new request of each, with a fresh id and deadline; the limits of the queue hold."""
    from pipeline.cli.dead import replay_dead

    source = given(config, overrides)
    _finish(asyncio.run(replay_dead(source, pool, ids or [], everything=everything, in_json=as_json)))


def dead_drop(
    ids: IdsArgument = None, everything: AllOption = False, force: ForceOption = False, pool: PoolOption = None,
    as_json: JsonOption = False, config: ConfigOption = None, overrides: SetOption = None,
) -> None:  # fmt: skip
    """Forget each for good, with all that is kept of it."""
    from pipeline.cli.dead import drop_dead

    source = given(config, overrides)
    _finish(asyncio.run(drop_dead(source, pool, ids or [], everything=everything, force=force, in_json=as_json)))


def _names(destination: list[str] | None) -> list[str]:
    return [name for words in destination or () for name in words.split(",") if name]


def _check_ids(action: enum.StrEnum, ids: list[str] | None, *, needed: bool) -> None:
    if needed and not ids:
        raise ConfigError(f"{action}: which request? give its id")
    if ids and not needed:
        raise ConfigError(f"{action} takes no ids: {' '.join(ids)}")


def _finish(code: Exit) -> NoReturn:
    raise typer.Exit(code)
