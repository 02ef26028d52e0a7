"""The command line: `baton up`, `api`, `worker`, `autoscale`, `chat`, `doctor`, `config`, `version`; for operators `status`, `inspect`,
`control`, `purge`, `dead`, `events`; `keys` and `batch`.

Exit codes are stable: 0 done; 1 something failed (the message says what); 2 wrong arguments or settings;
3 a port, folder, pool or program that is needed cannot be had; 4 the API or Redis does not answer; 69 no worker replied;
70 a worker's task could not be stopped; 130 interrupted.
"""

from __future__ import annotations

import sys

from pipeline.cli.app import make_app
from pipeline.config import LogSettings
from pipeline.errors import BatonError
from pipeline.exits import Exit, exit_for
from pipeline.logs import configure


def main() -> None:
    """Entry point of `baton`. Errors that Baton raises on purpose are one line on stderr, never a traceback."""
    configure(LogSettings(level="warning"), "baton")
    try:
        make_app()(prog_name="baton")
    except BatonError as error:
        print(f"baton: {error}", file=sys.stderr)
        sys.exit(exit_for(error))
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)
