"""Writes what pip would install on an empty machine, pinned, into the lock files: Baton with its extras, and the clients of its tests.

The head of each file is kept, and so is PyTorch's version. The local part of a version ("+cpu") is left out: it says which build
of PyTorch was found, and .ci/install chooses that. Run it with the oldest Python 3.11 that counts (Debian has 3.11.2, for which
redis needs async-timeout). Markers of direct requirements are kept, so that a platform without a wheel skips what is optional there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("torch", "embedded", "dev")
REPOSITORY = Path(__file__).parents[1]


def write(lock: Path, direct: list[Requirement], constraints: list[str]) -> None:
    head = [line for line in lock.read_text().splitlines() if line.startswith("#")]
    lock.write_text("".join(f"{line}\n" for line in [*head, *pinned(direct, constraints)]))


def pinned(direct: list[Requirement], constraints: list[str]) -> list[str]:
    markers = {canonicalize_name(requirement.name): requirement.marker for requirement in direct if requirement.marker}
    options = ["--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command = [sys.executable, "-m", "pip", "install", *options, *map(str, direct), *constraints]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    lines = []
    for package in sorted(report["install"], key=lambda package: canonicalize_name(package["metadata"]["name"])):
        name = canonicalize_name(package["metadata"]["name"])
        version = package["metadata"]["version"].partition("+")[0]
        lines.append(f"{name}=={version}" + (f" ; {markers[name]}" if name in markers else ""))
    return lines


def main() -> None:
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    project, groups = pyproject["project"], pyproject["dependency-groups"]
    ours, clients = REPOSITORY / "requirements.lock", REPOSITORY / "requirements-clients.lock"
    extras = [text for extra in EXTRAS for text in project["optional-dependencies"][extra]]
    torch = re.findall(r"^torch==\S+", ours.read_text(), re.MULTILINE)
    write(ours, [Requirement(text) for text in (*project["dependencies"], *extras)], torch)
    write(clients, [Requirement(text) for text in groups["clients"]], [])


main()
