"""A master, a replica and Sentinels on 127.0.0.1, which fail over within about a second."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.errors import RedisUnavailable
from pipeline.processes import bound_command
from pipeline.redis_server import RedisServer, find_server
from tests.system import free_port

MASTER = "mymaster"
CONFIG = """port {port}
bind 127.0.0.1
dir {dir}
logfile {dir}/sentinel.log
sentinel monitor {name} 127.0.0.1 {master} {quorum}
sentinel down-after-milliseconds {name} 500
sentinel failover-timeout {name} 3000
"""


class Guarded:
    """Two servers and their Sentinels. `servers[0]` is the first master."""

    def __init__(self, folder: Path, sentinels: int) -> None:
        self.folder = folder
        self.ports = [free_port(), free_port()]
        self.sentinel_ports = [free_port() for _ in range(sentinels)]
        self.servers: list[RedisServer] = []
        self._sentinels: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        """What Baton is given."""
        return f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in self.sentinel_ports)}/{MASTER}"

    def start(self) -> None:
        """Start everything and wait until the replica follows and every Sentinel knows it and the others."""
        for number, port in enumerate(self.ports):
            follow = ["--replicaof", "127.0.0.1", str(self.ports[0])] if number else []
            options = ["--port", str(port), "--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0", *follow]
            server = RedisServer.start(self.folder / str(number), options=options)
            self.servers.append(server)
            server.wait_ready()
        for port in self.sentinel_ports:
            folder = self.folder / f"sentinel-{port}"
            folder.mkdir()
            config = folder / "sentinel.conf"
            quorum = len(self.sentinel_ports) // 2 + 1
            config.write_text(CONFIG.format(port=port, dir=folder, name=MASTER, master=self.ports[0], quorum=quorum))
            command = bound_command([str(find_server().path), str(config), "--sentinel"], signal.SIGTERM)
            self._sentinels.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    async def ready(self) -> bool:
        """Whether a failover would work now."""
        for port in self.sentinel_ports:
            connection = Connection(RedisSettings(url=f"redis://127.0.0.1:{port}"))
            try:
                row = await connection.command("SENTINEL", "MASTER", MASTER)
                replicas = await connection.command("SENTINEL", "REPLICAS", MASTER)
            except RedisUnavailable:  # it starts
                return False
            finally:
                await connection.close()
            fields = dict(zip(row[::2], row[1::2], strict=True))
            if fields[b"num-slaves"] != b"1" or int(fields[b"num-other-sentinels"]) != len(self.sentinel_ports) - 1:
                return False
            replica = dict(zip(replicas[0][::2], replicas[0][1::2], strict=True))
            if replica[b"master-link-status"] != b"ok" or replica[b"flags"] != b"slave":
                return False
        return True

    def cut_replication(self) -> None:
        """From now on the replica hears nothing of the master: what is written is lost with it. The replica stands still."""
        self.servers[1].process.send_signal(signal.SIGSTOP)
        self.servers[0].command("CLIENT", "KILL", "TYPE", "replica")

    def kill_master(self) -> None:
        """kill -9; the replica goes on as it was when it was cut off."""
        self.servers[0].process.kill()
        self.servers[0].process.wait()
        self.servers[1].process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End everything."""
        for sentinel in self._sentinels:
            sentinel.terminate()
        for sentinel in self._sentinels:
            try:
                sentinel.wait(10)
            except subprocess.TimeoutExpired:
                sentinel.kill()
                sentinel.wait()
        for server in self.servers:
            if server.process.poll() is None:
                server.process.send_signal(signal.SIGCONT)
            server.stop()


@contextlib.contextmanager
def guarded(sentinels: int = 1) -> Iterator[Guarded]:
    """Running servers under Sentinels, in a folder of their own."""
    folder = Path(tempfile.mkdtemp(prefix="baton-", dir="/tmp"))
    group = Guarded(folder, sentinels)
    try:
        group.start()
        yield group
    finally:
        group.stop()
        shutil.rmtree(folder)
