"""Options that several commands share, and the one place where the command line reads the environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from pipeline.config import ApiSettings, Settings
from pipeline.settings_file import ENV_API_KEY, ENV_FILE, Value, collect_values, load_settings, settings_path

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help=f"Settings file (default: ${ENV_FILE}, else ./config.toml).")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as api.port=8001; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class Given(NamedTuple):
    """Where the settings of one call come from; children of it are started with the same."""

    path: Path | None
    overrides: list[str]

    def settings(self) -> Settings:
        """Raises ConfigError."""
        return load_settings(self.path, os.environ, self.overrides)

    def values(self) -> dict[str, Value]:
        """Every key with its value and source. Raises ConfigError."""
        return collect_values(self.path, os.environ, self.overrides)

    def arguments(self) -> list[str]:
        """The same as arguments of `python -m api` and `python -m workers`."""
        file = ["--config", str(self.path)] if self.path else []
        return [*file, *(word for override in self.overrides for word in ("--set", override))]


def given(config: Path | None, overrides: Sequence[str] | None, **named: object) -> Given:
    """What `--config`, `--set` and flags of their own (`api_port=8001` for `--port 8001`) ask for."""
    path = settings_path(config, os.environ)
    flags = [f"{key.replace('__', '.')}={value}" for key, value in named.items() if value is not None]
    return Given(path.absolute() if path else None, [*(overrides or ()), *flags])


def api_headers() -> dict[str, str]:
    """Who a command is to the API: the key in $BATON_API_KEY, if there is one."""
    key = os.environ.get(ENV_API_KEY)
    return {"authorization": f"Bearer {key}"} if key else {}


def base_url(text: str) -> str:
    """Where the API is, however a user writes it: with or without scheme, with or without the `/v1` that OpenAI clients want."""
    url = text if "://" in text else f"http://{text}"
    return url.rstrip("/").removesuffix("/v1")


def api_url(settings: ApiSettings) -> str:
    """Where the API is reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
