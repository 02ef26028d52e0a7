"""The commands of `baton batch` and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import ConfigOption, JsonOption, SetOption, api_url, base_url, given

UrlOption = Annotated[str | None, typer.Option(help="Where the API is; from the settings if left out.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The id of a batch.")]
FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, readable=True, help="A request a line.")
]
EndpointOption = Annotated[
    str | None, typer.Option(help="Such as /v1/chat/completions; the url of the first line if left out.")
]
WindowOption = Annotated[str, typer.Option(help="What has not run by then never will: 24h, 1h, 30m, up to 30d.")]
WaitOption = Annotated[bool, typer.Option("--wait", help="Wait for its end and show how far it is.")]
OutOption = Annotated[
    Path | None, typer.Option("--output", "-o", dir_okay=False, metavar="FILE", help="Write the results there.")
]


def add_batch_commands(app: typer.Typer) -> None:
    """Adds them to the command line."""
    batch = typer.Typer(help="Have files of requests answered.", no_args_is_help=True)
    for name, command in (
        ("submit", submit), ("run", run), ("list", list_all), ("status", status), ("cancel", cancel), ("results", results)
    ):  # fmt: skip
        batch.command(name)(command)
    app.add_typer(batch, name="batch")


def submit(
    file: FileArgument,
    endpoint: EndpointOption = None,
    window: WindowOption = "24h",
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A pair to be kept with it; repeatable.")
    ] = None,
    wait: WaitOption = False,
    output: OutOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Send a file, have its requests answered, and print the batch's id. --output waits, too.

    With --wait the exit code is 1 where not all requests succeeded; Ctrl-C leaves the batch running. Where the API needs a key, it is the
    one in BATON_API_KEY.
    """
    from pipeline.cli.batches import Batches, pairs

    kept = pairs(metadata or [])
    with Batches(_url(url, config, overrides), as_json=as_json) as batches:
        made = batches.submit(file, endpoint=endpoint, window=window, metadata=kept)
        if wait or output is not None:
            raise typer.Exit(batches.wait(made.id, output))
        batches.say_made(made)


def run(
    file: FileArgument,
    output: OutOption = None,
    errors: Annotated[
        Path | None, typer.Option("--errors", dir_okay=False, metavar="FILE", help="Write what failed there.")
    ] = None,
    endpoint: EndpointOption = None,
    window: WindowOption = "24h",
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Have a local file answered without the API: it goes straight to the queues. Answers go to stdout or a file.

    Redis and prefill and decode workers must be there, as for all requests; a batch worker comes and goes with this command. Ctrl-C
    cancels the batch and brings what was answered; the second time it is left to other batch workers. The exit code is 1 where not all
    requests succeeded.
    """
    from pipeline.cli.batch_run import Asked, run_file

    raise typer.Exit(run_file(given(config, overrides), Asked(file, output, errors, endpoint, window)))


def list_all(
    limit: Annotated[int, typer.Option(min=1, max=100, help="As many, the newest first.")] = 20,
    after: Annotated[str | None, typer.Option(metavar="ID", help="Those that were made before this one.")] = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """List batches."""
    from pipeline.cli.batches import Batches

    with Batches(_url(url, config, overrides), as_json=as_json) as batches:
        batches.show_all(limit, after)


def status(
    batch_id: IdArgument,
    wait: WaitOption = False,
    output: OutOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Show a batch as it stands; with --wait, or --output, as it ends."""
    from pipeline.cli.batches import Batches

    with Batches(_url(url, config, overrides), as_json=as_json) as batches:
        if wait or output is not None:
            raise typer.Exit(batches.wait(batch_id, output))
        batches.show(batch_id)


def cancel(
    batch_id: IdArgument, url: UrlOption = None, as_json: JsonOption = False, config: ConfigOption = None, overrides: SetOption = None
) -> None:  # fmt: skip
    """End a batch; what has been answered is kept."""
    from pipeline.cli.batches import Batches

    with Batches(_url(url, config, overrides), as_json=as_json) as batches:
        batches.cancel(batch_id)


def results(
    batch_id: IdArgument,
    output: OutOption = None,
    errors: Annotated[bool, typer.Option("--errors", help="Those that failed or did not run.")] = False,
    url: UrlOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Write the answers of a batch that has ended, a line each, to stdout or a file. Exits with 1 where there are none."""
    from pipeline.cli.batches import Batches

    with Batches(_url(url, config, overrides), as_json=False) as batches:
        raise typer.Exit(batches.results(batch_id, output, wants_errors=errors))


def _url(url: str | None, config: Path | None, overrides: list[str] | None) -> str:
    return base_url(url) if url else api_url(given(config, overrides).settings().api)
