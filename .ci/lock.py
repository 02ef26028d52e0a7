"""Prints the lines of requirements.lock: what pip would install for Baton and its extras on an empty machine, pinned.

The local part of a version ("+cpu") is left out: it says which build of PyTorch was found, and the Makefile chooses that.
Run it with the oldest Python 3.11 that counts (Debian has 3.11.2, for which redis needs async-timeout).
Markers of direct requirements are kept, so that a platform without a wheel skips what is optional there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("torch", "embedded", "dev")
REPOSITORY = Path(__file__).parents[1]

project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
constraint = sys.argv[1:]  # such as torch==2.13.0
texts = [*project["dependencies"], *(text for extra in EXTRAS for text in project["optional-dependencies"][extra])]
direct = [Requirement(text) for text in texts]
markers = {canonicalize_name(requirement.name): requirement.marker for requirement in direct if requirement.marker}

options = ["--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
command = [sys.executable, "-m", "pip", "install", *options, *map(str, direct), *constraint]
report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

for package in sorted(report["install"], key=lambda package: canonicalize_name(package["metadata"]["name"])):
    name = canonicalize_name(package["metadata"]["name"])
    version = package["metadata"]["version"].partition("+")[0]
    marker = f" ; {markers[name]}" if name in markers else ""
    sys.stdout.write(f"{name}=={version}{marker}\n")
