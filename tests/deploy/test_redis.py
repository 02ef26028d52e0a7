"""Redis takes the arguments that compose files and manifests give it, and means by them what they are there for."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import redis

from pipeline.redis_server import find_server
from tests.deploy.reading import compose, manifests, of_kind
from tests.deploy.test_compose import with_defaults

PASSWORD = "secret"


def arguments(place: str) -> list[str]:
    if place == "compose":
        return [with_defaults(word) for word in compose("compose.yaml")["services"]["redis"]["command"][1:]]
    (container,) = of_kind(manifests("base"), "StatefulSet")["redis"]["spec"]["template"]["spec"]["containers"]
    return [word.replace("$(REDIS_PASSWORD)", PASSWORD) for word in container["args"]]


def connected(socket: Path, password: str | None) -> redis.Redis:
    """A client of a server that has just been started."""
    client = redis.Redis(unix_socket_path=str(socket), password=password, decode_responses=True)
    for _ in range(500):
        try:
            client.ping()
        except redis.ConnectionError:
            time.sleep(0.02)
        else:
            return client
    raise TimeoutError(socket)


@pytest.mark.parametrize(("place", "password"), [("compose", None), ("cluster", PASSWORD)])
def test_it_appends_takes_no_snapshots_and_is_full_at_a_gibibyte(
    place: str, password: str | None, tmp_path: Path
) -> None:
    socket = tmp_path / "s"
    ours = ["--port", "0", "--unixsocket", str(socket), "--dir", str(tmp_path)]
    server = subprocess.Popen([find_server().path, *arguments(place), *ours], stdout=subprocess.DEVNULL)
    try:
        with connected(socket, password) as client:
            config: dict[str, str] = client.config_get("*")  # type: ignore[assignment]
    finally:
        server.terminate()
        server.wait(30)
    wanted = {
        "appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory": str(1024**3),
        "maxmemory-policy": "noeviction", "requirepass": password or "",
    }  # fmt: skip
    assert {name: config[name] for name in wanted} == wanted
