"""The commands of `baton` and their options; what they do is in the modules beside this one, imported when called."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import pipeline
from pipeline.cli.batch_commands import add_batch_commands
from pipeline.cli.key_commands import add_key_commands
from pipeline.cli.operate import add_operators_commands
from pipeline.cli.options import ConfigOption, Given, JsonOption, SetOption, given
from pipeline.cli.plain import PlainGroup
from pipeline.errors import ConfigError
from pipeline.queue import BATCH, EMBED, STAGES
from pipeline.redis_server import running_redis
from pipeline.settings_file import nearest

EXIT_CODES = (
    "Exit codes: 0 done; 1 something failed; 2 wrong arguments or settings; 3 a port, folder, pool or program cannot be had; "
    "4 the API or Redis does not answer; 69 no worker replied; 70 a worker's task could not be stopped; 130 interrupted."
)


def make_app() -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(
        name="baton",
        cls=PlainGroup,
        help="Serve large language models through queues: durable prefill and decode on Redis.",
        epilog=EXIT_CODES,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(root)
    commands: tuple[Callable[..., None], ...] = (up, api, worker, autoscale, chat, doctor, version)
    for command in commands:
        app.command()(command)
    settings = typer.Typer(help="Show and change settings.", no_args_is_help=True)
    subcommands: tuple[Callable[..., None], ...] = (show, get, env, set_router)
    for command in subcommands:
        settings.command()(command)
    app.add_typer(settings, name="config")
    add_operators_commands(app)
    add_key_commands(app)
    add_batch_commands(app)
    return app


def root(
    version: Annotated[  # read by its callback alone
        bool, typer.Option("--version", callback=lambda wanted: _say_version(wanted), is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Holds what may stand before a command."""


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"baton {pipeline.__version__}")
        raise typer.Exit


def up(
    prefill: Annotated[int | None, typer.Option(min=0, show_default="1", help="Prefill workers of each pool.")] = None,
    decode: Annotated[int | None, typer.Option(min=1, show_default="1", help="Decode workers of each pool.")] = None,
    embed: Annotated[int, typer.Option(min=0, help="Embed workers of each pool that makes embeddings.")] = 1,
    batch: Annotated[int, typer.Option(min=0, help="Workers that run batches, of all pools.")] = 1,
    autoscale: Annotated[
        bool,
        typer.Option(
            "--autoscale", help="As many prefill and decode workers as are needed now (settings autoscale.*)."
        ),
    ] = False,
    host: Annotated[str | None, typer.Option(help="Address of the API (api.host).")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the API (api.port); 0 takes a free one.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Use this Redis (redis.url) and start none.")] = None,
    sample: Annotated[bool, typer.Option(help="Stream one sample answer when ready.")] = True,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Start Redis, the API and workers here, stream a sample answer, serve until Ctrl-C."""
    from pipeline.cli.up import Counts, run_up

    source = given(config, overrides, api__host=host, api__port=port, redis__url=redis_url)
    counts = Counts(1 if prefill is None else prefill, decode or 1, embed, batch)
    if autoscale and (prefill, decode) != (None, None):
        raise ConfigError("--autoscale: leave out --prefill and --decode, [autoscale] says how many there are")
    raise typer.Exit(asyncio.run(run_up(source, counts, with_sample=sample, autoscale=autoscale)))


def api(config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Run the HTTP API in this process."""
    from pipeline.cli.up import free_port

    source = given(config, overrides)
    settings = source.settings().api
    free_port(settings.host, settings.port)
    _become("api", [], source)


def worker(
    stage: Annotated[
        str, typer.Argument(help="prefill, decode, embed, batch, or the queue of a stage of your own (with --app).")
    ],
    app: Annotated[
        str | None,
        typer.Option(metavar="MODULE", help="Where the tasks of that queue are: mystages, or mystages:stages."),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("-c", "--concurrency", min=1, help="Tasks of it at once (worker.concurrency).")
    ] = None,
    pool: Annotated[str | None, typer.Option(help="The pool it works for; needed when there are several.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name, unique in the pool; made up if left out.")] = None,
    engine: Annotated[str | None, typer.Option(help="The engine of its pool: torch, vllm, mock.")] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Run one worker in this process: of prefill, of decode, of embed, of batches (of all pools), or of a stage of your own.

    A stage of your own needs no engine: its tasks are functions of the module that --app names.
    """
    own = [word for flag, value in (("--pool", pool), ("--name", name)) if value for word in (flag, value)]
    if app:
        own += ["--app", app]
    elif stage not in (stages := (*STAGES, EMBED, BATCH)):
        hint = nearest(stage, stages)
        raise ConfigError(f"{stage} is none of {', '.join(stages)}{hint or ';'} a queue of your own needs --app MODULE")
    source = given(config, overrides, worker__concurrency=concurrency)
    pools = source.settings().pools
    if pool is None and len(pools) > 1 and stage != BATCH:
        raise ConfigError(f"--pool: which one of {', '.join(pools)}?")
    if pool is not None and pool not in pools:
        raise ConfigError(f"--pool: unknown pool {pool}{nearest(pool, pools)}")
    if engine:
        of_pool = f"pools.{pool or next(iter(pools))}.engine={engine}"
        source = given(config, [*(overrides or ()), of_pool], worker__concurrency=concurrency)
        source.settings()  # says what an engine can be
    _become("workers", [stage, *own], source)


def autoscale(
    pool: Annotated[list[str] | None, typer.Option("--pool", help="Only this pool; repeatable.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say why at every look, not only when something changes.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print decisions; start and stop nothing.")] = False,
    once: Annotated[bool, typer.Option("--once", help="One decision, printed, as --dry-run, then the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with --dry-run and --once.")] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Start and drain workers on this machine, as many as each pool needs now, until Ctrl-C. The settings autoscale.* say what is
    promised, and how many there may be. Workers that others started count, and are left alone."""
    from pipeline.cli.autoscale import run_autoscale, show_decisions

    source = given(config, overrides)
    if dry_run or once:
        asyncio.run(show_decisions(source, pool or (), once=once, as_json=as_json))
        return
    if as_json:
        raise ConfigError("--json is for --dry-run and --once")
    raise typer.Exit(asyncio.run(run_autoscale(source, pool or (), explain=explain)))


def chat(
    text: Annotated[str | None, typer.Argument(help="What to say; left out: a conversation.")] = None,
    model: Annotated[str | None, typer.Option(help="The pool to ask; the first one if left out.")] = None,
    url: Annotated[str | None, typer.Option(help="Where the API is; from the settings if left out.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Talk to a model in the terminal; each answer ends with where its time went. Where the API needs a key, it is the one in
    BATON_API_KEY."""
    from pipeline.cli.chat import Question, run_chat

    source = given(config, overrides)
    question = Question(url, model, max_tokens, temperature)
    run_chat(source.settings(), question, text, as_json=as_json)


def doctor(as_json: JsonOption = False, config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Check this machine and these settings; every finding comes with its fix. Exits with 1 when one is an error."""
    from pipeline.cli.doctor import run_doctor

    raise typer.Exit(asyncio.run(run_doctor(given(config, overrides), as_json=as_json)))


def version(as_json: JsonOption = False) -> None:
    """Print the versions of Baton and of what it stands on."""
    versions = {"baton": pipeline.__version__, "python": platform.python_version()}
    for package in ("redis", "fastapi", "transformers", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    if as_json:
        print(json.dumps(versions))
        return
    for name, number in versions.items():
        print(f"{name:<13} {number or 'not installed'}")


def show(as_json: JsonOption = False, config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Print every setting, its value and where that came from."""
    from pipeline.cli.config import show_settings

    show_settings(given(config, overrides), as_json=as_json)


def get(
    key: Annotated[str, typer.Argument(help="Such as api.port.")],
    as_json: JsonOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Print one setting."""
    from pipeline.cli.config import get_setting

    get_setting(given(config, overrides), key, as_json=as_json)


def env(as_json: JsonOption = False, config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Print the environment variable of every setting, with the value that holds."""
    from pipeline.cli.config import show_variables

    show_variables(given(config, overrides), as_json=as_json)


def set_router(
    max_local_prefill_length: Annotated[
        int | None, typer.Option(min=0, help="Prompts with more tokens to compute than this are prefilled remotely.")
    ] = None,
    max_prefill_queue_size: Annotated[
        int | None, typer.Option(min=0, help="With this many tasks waiting, decode workers prefill by themselves.")
    ] = None,
    pool: Annotated[str | None, typer.Option(help="One pool; all of them if left out.")] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Change the router of running APIs, all replicas at once. Without values: print what holds."""
    from pipeline.cli.config import change_router

    changes = {
        name: value
        for name, value in (
            ("max_local_prefill_length", max_local_prefill_length),
            ("max_prefill_queue_size", max_prefill_queue_size),
        )
        if value is not None
    }
    asyncio.run(change_router(given(config, overrides), pool, changes, as_json=as_json))


def _become(module: str, own: list[str], source: Given) -> None:
    """Replaces this process: the border between packages is a border between processes.

    Without a `redis.url` it joins the `baton up` of this folder, as `baton chat` does. Raises RedisUnavailable.
    """
    redis = source.settings().redis
    joined = [] if redis.url else ["--set", f"redis.url={running_redis(redis).url}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *own, *source.arguments(), *joined])
