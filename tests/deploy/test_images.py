"""The images of the API and of CPU workers, made as their Dockerfiles say and run as an engine would: they answer, and leave when told to.

No container engine is needed: `image.py` and `containers.py` are what stands in for one. Run by `make images`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline
from tests.deploy.containers import Container, Host, host
from tests.deploy.image import Image, build, remove
from tests.deploy.reading import DOCKER

NEEDED = ("debootstrap", "unshare", "nsenter", "chroot", "ip", "curl")
MISSING = [program for program in NEEDED if shutil.which(program) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="roots and namespaces need root"),
    pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)}"),
]

REDIS = {"BATON_REDIS_URL": "redis://127.0.0.1:6379/0"}
CHAT = {"model": "baton-tiny", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 24}
TOOLS = ("gcc", "cc", "make", "git", "pip", "pip3", "pip3.11")


@pytest.fixture(scope="module")
def images() -> Iterator[dict[str, Image]]:
    """Made once. IMAGES_FOLDER names a folder that keeps them, and the base for the next time."""
    kept = os.environ.get("IMAGES_FOLDER")
    folder = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="baton-images-", dir="/var/tmp"))
    try:
        yield build([DOCKER / "api.Dockerfile", DOCKER / "worker-cpu.Dockerfile"], folder)
    finally:
        if not kept:
            remove(folder)


@pytest.fixture(scope="module")
def machine(images: dict[str, Image], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with host(tmp_path_factory.mktemp("host")) as made:
        yield made


@pytest.fixture(scope="module")
def blocks() -> Iterator[Path]:
    """Memory that all workers see as /dev/shm."""
    folder = Path(tempfile.mkdtemp(prefix="baton-blocks-", dir="/dev/shm"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def containers(images: dict[str, Image], machine: Host, blocks: Path) -> dict[str, Container]:
    """What compose.yaml starts, with the volumes that it names, once its health checks say so."""
    user = images["api"].user
    cache, files = machine.volume("cache", user), machine.volume("files", user)
    kept = {"/var/lib/baton/cache": cache}
    with_files, with_blocks = {**kept, "/var/lib/baton/files": files}, {**kept, "/dev/shm": blocks}
    api, worker = images["api"], images["worker-cpu"]
    started = {
        "api": machine.run("api", api, volumes=with_files, BATON_API_AUTH="off", **REDIS),
        "prefill": machine.run("prefill", worker, "worker", "prefill", volumes=with_blocks, **REDIS),
        "decode": machine.run("decode", worker, volumes=with_blocks, **REDIS),
    }
    for name, container in started.items():
        print(f"{name}: healthy after {container.wait_healthy():.1f} s more")
    return started


@pytest.mark.parametrize("name", ["api", "worker-cpu"])
def test_it_is_this_version_without_tools_that_build(images: dict[str, Image], name: str) -> None:
    image = images[name]
    assert image.labels["org.opencontainers.image.version"] == pipeline.__version__
    folders = [image.root / folder.lstrip("/") for folder in image.env["PATH"].split(":")]
    assert [tool for tool in TOOLS for folder in folders if (folder / tool).exists()] == []
    torch = list(image.root.glob("opt/baton/lib/python3.11/site-packages/torch"))
    assert len(torch) == (name == "worker-cpu")


def test_a_health_check_tells_who_is_not_at_work(containers: dict[str, Container]) -> None:
    assert all(container.is_healthy() for container in containers.values())
    decode = containers["decode"]
    workers = [int(status["Pid"]) for number, status in decode.processes().items() if number != 1]
    try:
        for pid in workers:  # so that it does not show itself anew
            os.kill(pid, signal.SIGSTOP)
        assert decode.execute("rm", "/tmp/baton/ready").returncode == 0
        assert not decode.is_healthy()
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    decode.wait_healthy()


def test_process_1_is_tini_and_all_are_of_a_user_without_rights(containers: dict[str, Container]) -> None:
    for container in containers.values():
        processes = container.processes()
        assert processes[1]["Name"] == "tini"
        assert len(processes) > 1
        for status in processes.values():
            assert set(status["Uid"].split()) == {"10001"}
            assert int(status["CapEff"], 16) == 0


def test_nothing_can_be_written_but_volumes(containers: dict[str, Container]) -> None:
    for container in containers.values():
        refused = container.execute("touch", "/var/lib/baton/file")  # a folder of its own
        assert "Read-only file system" in refused.stderr
        assert container.execute("touch", "/tmp/file", "/var/lib/baton/cache/file").returncode == 0


def test_a_request_is_answered(containers: dict[str, Container], machine: Host) -> None:
    answer = machine.ask("/v1/chat/completions", CHAT)
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] > 1
    streamed = machine.curl("/v1/chat/completions", "--no-buffer", "--json", json.dumps({**CHAT, "stream": True}))
    assert streamed.count("data: ") > 5
    assert streamed.endswith("data: [DONE]\n\n")


def test_blocks_went_through_the_memory_that_workers_share(containers: dict[str, Container]) -> None:
    told = containers["api"].execute("baton", "inspect", "stats", "--json")
    stats: dict[str, Any] = json.loads(told.stdout)
    (decode,) = [stats[name] for name in stats if name.startswith("decode")]
    fetched = decode["transfer"]["fetched"]
    assert list(fetched) == ["shm"]
    assert fetched["shm"]["nbytes"] > 0


def test_a_batch_worker_runs_from_the_image_of_the_api(
    images: dict[str, Image], containers: dict[str, Container], machine: Host
) -> None:
    volumes = {"/var/lib/baton/cache": machine.folder / "cache", "/var/lib/baton/files": machine.folder / "files"}
    batch = machine.run("batch", images["api"], "worker", "batch", volumes=volumes, **REDIS)
    batch.image.healthcheck = images["worker-cpu"].healthcheck  # as compose.yaml gives it
    batch.wait_healthy()
    lines = [{"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": CHAT} for n in range(3)]
    text = "\n".join(map(json.dumps, lines))
    (machine.folder / "cache" / "requests.jsonl").write_text(text)
    file = "/var/lib/baton/cache/requests.jsonl"
    result = containers["api"].execute("baton", "batch", "submit", file, "--wait", limit_s=90)
    assert (result.returncode, "3" in result.stdout) == (0, True), result.stderr
    assert batch.stop() == 0


def test_they_leave_when_told_to(containers: dict[str, Container]) -> None:
    for container in containers.values():
        assert container.stop() == 0, container.log.read_text()
