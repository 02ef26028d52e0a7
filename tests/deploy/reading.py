"""What lies in `docker/`, read: Dockerfiles, compose files and manifests as values."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from dockerfile_parse import DockerfileParser

from pipeline.config import Settings
from pipeline.settings_file import load_settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
K8S = DOCKER / "k8s"

Object = dict[str, Any]


class Loader(yaml.SafeLoader):
    """YAML with compose's tags, which say how one file goes over another."""


Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node, deep=True))


def compose(name: str) -> Object:
    """A compose file."""
    loaded: Object = yaml.load((DOCKER / name).read_text(), Loader)
    return loaded


def objects_of(text: str) -> list[Object]:
    """The Kubernetes objects of a YAML text."""
    return [document for document in yaml.safe_load_all(text) if document]


def manifests(folder: str) -> list[Object]:
    """The objects that a kustomization of `docker/k8s` names in files beside it, as they stand there."""
    kustomization = yaml.safe_load((K8S / folder / "kustomization.yaml").read_text())
    paths = [K8S / folder / name for name in kustomization["resources"] if name.endswith(".yaml")]
    return [found for path in paths for found in objects_of(path.read_text())]


def readme_yaml() -> list[str]:
    """The YAML in `docker/README.md`."""
    return re.findall(r"^```yaml\n(.*?)^```", (DOCKER / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def rendered_overlay(folder: Path, kustomization: str, config: str = "") -> list[Object]:
    """What `kubectl kustomize` makes of an overlay of somebody's own, beside a checkout called `baton`."""
    shutil.copytree(K8S, folder / "baton" / "docker" / "k8s")
    mine = folder / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(kustomization)
    (mine / "config.toml").write_text(config)
    return rendered(mine)


def rendered(folder: str | Path) -> list[Object]:
    """What `kubectl kustomize` makes of a folder, of `docker/k8s` where it is told by name."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here: the files are checked one by one only")
    command = ["kubectl", "kustomize", str(K8S / folder)]
    return objects_of(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


def settings_of(path: Path) -> Settings:
    """The settings that a file of ours makes."""
    return load_settings(path, {}, [])


def of_kind(objects: list[Object], *kinds: str) -> dict[str, Object]:
    """Those of a kind, by name."""
    return {found["metadata"]["name"]: found for found in objects if found["kind"] in kinds}


class Step(NamedTuple):
    """One instruction of a Dockerfile: its flags (`--from=build`), and the rest."""

    name: str
    flags: dict[str, list[str]]
    value: str

    @property
    def words(self) -> list[str]:
        """Its parts, in either form: `["a", "b"]` or `a b`."""
        return json.loads(self.value) if self.value.startswith("[") else shlex.split(self.value)

    @property
    def pairs(self) -> dict[str, str]:
        """NAME=value of ENV, LABEL and ARG."""
        return {name: value for name, _, value in (word.partition("=") for word in self.words)}


def steps_of(path: Path) -> list[Step]:
    """The instructions of a Dockerfile."""
    structure = DockerfileParser(fileobj=io.BytesIO(path.read_bytes())).structure
    return [_step(part["instruction"], part["value"]) for part in structure if part["instruction"] != "COMMENT"]


def _step(name: str, value: str) -> Step:
    flags: dict[str, list[str]] = {}
    while value.startswith("--") and name != "HEALTHCHECK":
        flag, _, value = value.partition(" ")
        key, _, given = flag.removeprefix("--").partition("=")
        flags.setdefault(key, []).append(given)
        value = value.lstrip()
    return Step(name, flags, value)


def stages_of(path: Path) -> list[list[Step]]:
    """The instructions from each FROM on; the last list is of the image itself."""
    stages: list[list[Step]] = []
    for step in steps_of(path):
        if step.name == "FROM":
            stages.append([])
        if stages:
            stages[-1].append(step)
    return stages


def arguments_of(path: Path) -> dict[str, str]:
    """The ARGs before the first FROM, with their defaults."""
    found: dict[str, str] = {}
    for step in steps_of(path):
        if step.name == "FROM":
            break
        found |= step.pairs
    return found


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a file of the repository into a build: the last rule that fits wins, one of a folder is for all in it."""
    sent = True
    for rule in _ignore_rules():
        pattern = rule.removeprefix("!").lstrip("/")
        if any(_fits(part, pattern) for part in _with_parents(path)):
            sent = rule.startswith("!")
    return sent


def _ignore_rules() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _with_parents(path: str) -> Iterator[str]:
    parts = path.split("/")
    yield from ("/".join(parts[:end]) for end in range(1, len(parts) + 1))


def _fits(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch(path.rpartition("/")[2], pattern[3:])
    return path.count("/") == pattern.count("/") and fnmatch(path, pattern)
