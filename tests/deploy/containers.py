"""Runs images of `image.py` as a container engine would: each as process 1 of its own, on a read-only root, in one network that has nothing
but its loopback, so that ports are those of the images and nobody else reaches them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.redis_server import find_server
from tests.deploy.image import Image

READY_LIMIT_S = 120.0
ENDS_LIMIT_S = 120.0


class Container:
    """A running image."""

    def __init__(self, image: Image, process: subprocess.Popen[bytes], log: Path) -> None:
        self.image = image
        self.log = log
        self._process = process

    @property
    def first(self) -> int:
        """Its process 1, as this machine numbers it."""
        (pid,) = self._children()
        return pid

    def _children(self) -> list[int]:
        """Of unshare: process 1, from the moment on when that is started."""
        text = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    def processes(self) -> dict[int, dict[str, str]]:
        """What the kernel says of each process in it, by its number there."""
        wanted = Path(f"/proc/{self.first}/ns/pid").readlink()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if (folder / "ns" / "pid").readlink() == wanted:
                    lines = (folder / "status").read_text().splitlines()
                    status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
                    found[int(status["NSpid"].split()[-1])] = status
        return found

    def execute(self, *words: str, limit_s: float = 60) -> subprocess.CompletedProcess[str]:
        """What `docker exec` does."""
        environment = [f"{name}={value}" for name, value in self.image.env.items()]
        enter = ["nsenter", "--target", str(self.first), "--mount", "--pid", "--net"]
        change = ["chroot", "--userspec", self.image.user, str(self.image.root), "/usr/bin/env", "-i", *environment]
        return subprocess.run([*enter, *change, *words], capture_output=True, text=True, timeout=limit_s)

    def is_healthy(self) -> bool:
        """What the image's health check says."""
        return bool(self._children()) and self.execute(*self.image.healthcheck).returncode == 0

    def wait_healthy(self) -> float:
        """Seconds until it is. Raises with its log when it ends or takes too long."""
        began_s = time.monotonic()
        while time.monotonic() - began_s < READY_LIMIT_S:
            if self._process.poll() is not None:
                raise RuntimeError(f"ended with {self._process.returncode}:\n{self.log.read_text()}")
            if self.is_healthy():
                return time.monotonic() - began_s
            time.sleep(0.5)
        raise RuntimeError(f"not healthy after {READY_LIMIT_S:g} s:\n{self.log.read_text()}")

    def stop(self) -> int:
        """What `docker stop` does, with all the time that it wants: process 1 gets TERM. Its exit code."""
        if self._process.poll() is None:
            os.kill(self.first, signal.SIGTERM)
        return self._process.wait(ENDS_LIMIT_S)

    def kill(self) -> None:
        """Ends it with all its processes."""
        if self._process.poll() is None:
            self._process.kill()  # the kernel ends process 1 with it (--kill-child), and with that the others
            self._process.wait(ENDS_LIMIT_S)


@dataclasses.dataclass
class Host:
    """One network, and the folders that containers share as volumes."""

    folder: Path
    enter: list[str]
    containers: list[Container] = dataclasses.field(default_factory=list)

    def volume(self, name: str, owner: str = "0:0") -> Path:
        """A folder that lasts, and that its user may write to."""
        path = self.folder / name
        path.mkdir(exist_ok=True)
        user, _, group = owner.partition(":")
        os.chown(path, int(user), int(group))
        return path

    def run(self, name: str, image: Image, *words: str, volumes: dict[str, Path], **variables: str) -> Container:
        """Start a container; `words` in the place of the image's own command."""
        root = str(image.root)
        mounts = [["--bind", root, root], ["-o", "remount,bind,ro", root], *image.system_mounts()]
        mounts.append(["-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{root}/tmp"])
        mounts += [["--bind", str(source), f"{root}{target}"] for target, source in volumes.items()]
        within = dataclasses.replace(image, env={**image.env, **variables})
        command = within.command([*image.entrypoint, *(words or image.cmd)], mounts, as_process_1=True)
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen([*self.enter, *command], stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        container = Container(within, process, log)
        self.containers.append(container)
        return container

    def curl(self, path: str, *words: str) -> str:
        """What the API answers. Raises where it is an error."""
        command = [*self.enter, "curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "60", *words]
        result = subprocess.run([*command, f"http://127.0.0.1:8000{path}"], capture_output=True, text=True, timeout=90)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a body."""
        answer: dict[str, Any] = json.loads(self.curl(path, "--json", json.dumps(body)))
        return answer


@contextlib.contextmanager
def host(folder: Path) -> Iterator[Host]:
    """A network with a Redis in it; at the end everything in it has ended."""
    with contextlib.ExitStack() as stack:
        alone = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"]
        holder = subprocess.Popen(alone, stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        stack.callback(holder.stdout.close)
        stack.callback(holder.wait)
        stack.callback(holder.kill)
        assert holder.stdout.readline() == "up\n"
        made = Host(folder, ["nsenter", f"--net=/proc/{holder.pid}/ns/net"])
        redis = [
            "--port",
            "6379",
            "--bind",
            "127.0.0.1",
            "--appendonly",
            "yes",
            "--save",
            "",
            "--maxmemory-policy",
            "noeviction",
        ]
        server = [*made.enter, str(find_server().path), *redis, "--dir", str(made.volume("redis"))]
        process = subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)
        stack.callback(lambda: [container.kill() for container in made.containers])
        yield made
