"""`python -m api --config config.toml`: one API process.

Start: settings, socket (a taken port is told before anything else), Redis, tokenizers, HTTP.
Stop (SIGTERM, SIGINT): no new connections; running answers get `api.shutdown_grace_s`, then they end with an error event; last,
Redis is left. A second SIGINT does not wait.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator

import structlog
import uvicorn
import uvloop

from api.app import create_app
from api.drain import Drain
from api.key_ring import KeyRing
from api.rate_limits import RateLimits
from pipeline import logs, settings_file
from pipeline.api_keys import is_loopback
from pipeline.batches.creating import Batches
from pipeline.batches.jobs import BatchQueue
from pipeline.batches.records import BatchRecords
from pipeline.config import ApiSettings, Settings
from pipeline.connection import Connection
from pipeline.errors import BatonError
from pipeline.exits import Exit, PortTaken, exit_for
from pipeline.files.store import FileStore
from pipeline.ids import new_process_name
from pipeline.key_store import KeysFile, KeyStore
from pipeline.loras import check_model_names
from pipeline.pools import open_pool
from pipeline.processes import die_with_parent
from pipeline.redis_health import RedisWatch
from pipeline.scaling.policy import check
from pipeline.scaling.watch import PoolWatch

LAST_WORDS_S = 3.0  # after the grace: error events are written, requests cancelled
KEEP_ALIVE_S = 75  # longer than load balancers keep idle connections, so that they close them, not we

log = structlog.get_logger("baton.api")


def main() -> int:
    """Run until told to stop. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m api", description="Baton's HTTP server")
    parser.add_argument("--parent", type=int, default=0, help="end when this process ends")
    settings_file.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.parent:
        die_with_parent(arguments.parent)
    try:
        settings = settings_file.settings_from(arguments, os.environ)
        logs.configure(settings.log, "api")
        logging.getLogger("uvicorn.error").addFilter(_is_for_us)
        logging.getLogger("sse_starlette").setLevel(logging.INFO)  # at debug it writes every event, so every answer
        uvloop.run(serve(settings))
    except BatonError as error:
        sys.stderr.write(f"baton api: {error}\n")
        return exit_for(error)
    except KeyboardInterrupt:  # before it serves: while it waits for Redis, or reads a tokenizer
        return Exit.INTERRUPTED
    return 0


def _is_for_us(record: logging.LogRecord) -> bool:
    """uvicorn says what Ctrl-C does in a terminal of its own; under `baton up` that is not so, and we say when we leave."""
    return "CTRL+C" not in record.getMessage()


async def serve(settings: Settings) -> None:
    """Serve all pools of `settings`. Raises BatonError when the process cannot start."""
    check_model_names(settings.pools)
    check(settings.autoscale)
    listener = listen(settings.api.host, settings.api.port)
    drain = Drain(settings.api.shutdown_grace_s)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(listener.close)
        connection = Connection(settings.redis)
        stack.push_async_callback(connection.close)
        await connection.reach()
        keys = await load_keys(settings.api, connection)
        name = new_process_name("api")
        pools = {
            pool: await stack.enter_async_context(open_pool(pool, settings, connection, name))
            for pool in settings.pools
        }
        watch, files = RedisWatch(connection), FileStore(settings.files, connection)
        scaling = {pool: PoolWatch(connection, pool, settings.autoscale, defers=True) for pool in pools}
        for work, task_name in (
            (watch.run(), "redis health"), (keys.run(), "api keys"), (files.run(), "files"),
            *((one.run(), f"scaling of {pool}") for pool, one in scaling.items()),
        ):  # fmt: skip
            stack.callback(asyncio.create_task(work, name=task_name).cancel)
        batches = make_batches(settings, connection, files)
        app = create_app(settings.api, pools, drain, watch, keys, RateLimits(connection), files, batches, scaling)
        log.info("serving", host=settings.api.host, port=listener.getsockname()[1], name=name, pools=list(pools))
        await Server(http_config(app, settings.api), drain).serve(sockets=[listener])
    log.info("left")


def make_batches(settings: Settings, connection: Connection, files: FileStore) -> Batches:
    """Who makes batches. Raises ConfigError for a queue that cannot be."""
    records = BatchRecords.of(connection, settings.batches)
    return Batches(settings.batches, records, files, BatchQueue(settings.redis, settings.rq))


async def load_keys(settings: ApiSettings, connection: Connection) -> KeyRing:
    """Who may ask. Raises ConfigError where that is everybody who reaches the address, and nobody has said so."""
    keys = KeyRing(
        KeyStore(connection), KeysFile(settings.keys_file), mode=settings.auth, host=settings.host,
        refresh_s=settings.keys_refresh_s,
    )  # fmt: skip
    await keys.load()
    if not keys.needs_key and not is_loopback(settings.host):
        log.warning("everybody who reaches this address may use it: api.auth is off", host=settings.host)
    return keys


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PortTaken when the address is taken or is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise PortTaken(f"cannot listen on {host}:{port}: {error.strerror}; set api.host or api.port") from error


def http_config(app: object, settings: ApiSettings) -> uvicorn.Config:
    """How uvicorn runs here: logs, signals and start-up are ours."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_s + LAST_WORDS_S),
    )


class Server(uvicorn.Server):
    """uvicorn that leaves by `Drain`, and does not raise the signal again when it has left: Redis is still to be left."""

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self._drain = drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn when it was told to stop."""
        self._drain.begin()
        log.info("leaving", connections=len(self.server_state.connections))
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask the server to stop while it serves."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


if __name__ == "__main__":
    sys.exit(main())
