"""Performs a Dockerfile where there is no container engine: each instruction in a folder that is a root of its own, by chroot.

    python -m tests.deploy.image FOLDER docker/api.Dockerfile docker/worker-cpu.Dockerfile

1. The base image is a Debian with Python as its packages have it (debootstrap), made once; each stage begins as a copy of it.
2. RUN runs in the stage's root, as its USER, in its WORKDIR, with its ENV and ARG and nothing else of the caller's environment.
3. COPY takes from the repository what .dockerignore lets through, or from another stage.
4. What is left is the image: a root, and how its process is started (`Image`).

apt and pip use what this machine is set up with (sources, keys, certificates, indexes), which is lent for the time of a RUN only.
Everything that runs in a root does so in a mount namespace of its own: nothing has to be unmounted, and nothing of this machine can
be removed with a root. It needs root itself. What differs from a real build: the base has Debian's own Python 3.11, not that of
python:3.11-slim, and there are no layers.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from tests.deploy.reading import ROOT, Step, arguments_of, is_sent, stages_of

SUITE = "bookworm"
PACKAGES = ("ca-certificates", "python3.11", "python3.11-venv", "python3-distutils")
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
STEP_LIMIT_S = 900
WORTH_TELLING_S = 0.5
MOUNT = 'again() { mount "$@" || { sleep 0.5; mount "$@"; }; }'  # to make one read-only may fail while the kernel still looks through it
APT = (
    "etc/apt/sources.list",
    "etc/apt/sources.list.d",
    "etc/apt/apt.conf.d",
    "etc/apt/trusted.gpg.d",
    "etc/apt/keyrings",
)
LENT = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs", *(f"/{path}" for path in APT), "/usr/share/keyrings")


@dataclasses.dataclass
class Image:
    """A root, and how its process is started; while it is made, also what the next instruction finds."""

    root: Path
    env: dict[str, str] = dataclasses.field(default_factory=lambda: {"PATH": BASE_PATH})
    arguments: dict[str, str] = dataclasses.field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    entrypoint: list[str] = dataclasses.field(default_factory=list)
    cmd: list[str] = dataclasses.field(default_factory=list)
    healthcheck: list[str] = dataclasses.field(default_factory=list)
    labels: dict[str, str] = dataclasses.field(default_factory=dict)

    def inside(self, path: str) -> Path:
        """A path of the image, as it is reached from outside."""
        return self.root / PurePosixPath("/", self.workdir, path).relative_to("/")

    def command(self, words: list[str], mounts: list[list[str]], *, as_process_1: bool = False) -> list[str]:
        """What runs `words` in the image, as its user and in its folder.

        `mounts` are arguments of mount(8), by which it sees more than its root. As process 1 it has numbers of processes of its own, and
        all of them end with it.
        """
        environment = [f"{name}={value}" for name, value in self.env.items()]
        user = ["--userspec", self.user] if self.user != "0:0" else []
        change = ["chroot", *user, str(self.root), "/usr/bin/env", "-i", *environment]
        go = ["sh", "-c", 'cd "$0" && exec "$@"', self.workdir]
        script = " && ".join([MOUNT, *(shlex.join(["again", *mount]) for mount in mounts), 'exec "$@"'])
        apart = ["--mount", "--propagation", "private", *(["--pid", "--fork", "--kill-child"] if as_process_1 else [])]
        return ["unshare", *apart, "sh", "-c", script, "sh", *change, *go, *words]

    def note(self, step: Step) -> None:
        """An instruction that only says how the image is run."""
        match step.name:
            case "ENV":
                self.env |= step.pairs
            case "LABEL":
                self.labels |= step.pairs
            case "USER":
                self.user = step.value
            case "WORKDIR":
                self.workdir = step.value
                self.inside(".").mkdir(parents=True, exist_ok=True)
            case "ENTRYPOINT":
                self.entrypoint = step.words
            case "CMD":
                self.cmd = step.words
            case "HEALTHCHECK":
                self.healthcheck = Step("CMD", {}, step.value.partition("CMD ")[2]).words
            case "EXPOSE":
                pass
            case _:
                raise ValueError(f"nothing here performs {step.name}")

    def system_mounts(self) -> list[list[str]]:
        """/proc and /dev."""
        return [["-t", "proc", "proc", str(self.root / "proc")], ["--rbind", "/dev", str(self.root / "dev")]]

    def lend(self, path: str, source: str) -> list[list[str]]:
        """A file or folder of this machine, read-only at a path of the image; nothing where this machine has none."""
        target = self.root / path.lstrip("/")
        if not Path(source).exists():
            return []
        if Path(source).is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif not target.is_file() or target.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.touch()
        return [["--bind", "-o", "ro", source, str(target)]]


def make_base(root: Path) -> None:
    """A Debian with Python, which stands for the base image. Its mirror is the one that apt uses here."""
    if (root / "done").exists():
        return
    remove(root)
    words = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root), mirror()]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=STEP_LIMIT_S)
    for name in ("python", "python3"):
        (root / "usr/local/bin" / name).symlink_to("/usr/bin/python3.11")
    (root / "done").touch()


def mirror() -> str:
    """Where apt gets Debian's packages here."""
    told = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return next(line.split()[0] for line in told.stdout.splitlines() if line.split()[1:] == [SUITE, "main"])


def pip_settings() -> tuple[list[str], str]:
    """What pip is told on this machine: paths that it names, and all of it as the text of a pip.conf."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True, timeout=60
    )
    values: dict[str, str] = {}
    for line in told.stdout.splitlines():
        name, _, value = line.partition("=")
        values[name.rpartition(".")[2]] = value.strip("'\"")
    words = [word for value in values.values() for word in value.split()]
    paths = [word for word in words if word.startswith("/")]
    indexes = [word.removeprefix("file://") for word in words if word.startswith("file://")]
    paths += [str(Path(index).parent) for index in indexes]  # an index names files beside it
    text = "".join(f"{name} = {value}\n" for name, value in values.items())
    return paths, f"[global]\n{text}"


class Build:
    """The stages of one Dockerfile, performed in order."""

    def __init__(self, dockerfile: Path, folder: Path, base: Path, secrets: Mapping[str, Path]) -> None:
        self._dockerfile = dockerfile
        self._folder = folder
        self._base = base
        self._secrets = secrets
        self._stages: dict[str, Image] = {}

    def run(self) -> Image:
        """Perform it all; the last stage is the image. The others are removed."""
        for number, steps in enumerate(stages_of(self._dockerfile)):
            image = Image(self._folder / f"stage-{number}")
            self._stages[str(number)] = image
            for step in steps:
                began_s = time.monotonic()
                self._perform(image, step)
                _say(f"{self._dockerfile.name} {number}: {step.name} {step.value[:90]}", time.monotonic() - began_s)
        for made in self._stages.values():
            if made is not image:
                remove(made.root)
        return image

    def _perform(self, image: Image, step: Step) -> None:
        match step.name:
            case "FROM":
                self._begin(image, step)
            case "RUN":
                self._execute(image, step)
            case "COPY":
                self._copy(image, step)
            case "ARG":
                outside = {"TORCH_INDEX": os.environ.get("TORCH_INDEX", "")}
                image.arguments |= {name: outside.get(name) or value for name, value in step.pairs.items()}
            case _:
                image.note(step)

    def _begin(self, image: Image, step: Step) -> None:
        base, *named = step.words
        version = arguments_of(self._dockerfile)["PYTHON"]
        assert base.replace("${PYTHON}", version) == f"python:{version}", base
        if named:
            self._stages[named[1]] = image
        subprocess.run(["cp", "--archive", "--reflink=auto", self._base, image.root], check=True, timeout=STEP_LIMIT_S)

    def _execute(self, image: Image, step: Step) -> None:
        lent = {path: path for path in LENT}
        for mount in step.flags.get("mount", ()):
            options = dict(part.split("=") for part in mount.split(","))
            assert options["type"] == "secret", mount
            lent |= {path: path for path in pip_settings()[0]}  # what its pip.conf names
            lent[options["target"]] = str(self._secrets[options["id"]])
        mounts = [mount for path, source in lent.items() for mount in image.lend(path, source)]
        within = dataclasses.replace(image, env={**image.env, **image.arguments})
        command = within.command(["sh", "-c", step.value], [*image.system_mounts(), *mounts])
        result = subprocess.run(command, capture_output=True, text=True, timeout=STEP_LIMIT_S)
        if result.returncode != 0:
            raise RuntimeError(
                f"{self._dockerfile.name}: RUN ended with {result.returncode}\n{result.stdout}{result.stderr}"
            )

    def _copy(self, image: Image, step: Step) -> None:
        *sources, target = step.words
        into = image.inside(target)
        for source in sources:
            if "from" in step.flags:
                origin = self._stages[step.flags["from"][0]].inside(source)
                subprocess.run(["cp", "--archive", "--no-target-directory", origin, into], check=True, timeout=600)
            else:
                copy_sent(source, into if len(sources) == 1 and not target.endswith("/") else into / source)


def copy_sent(source: str, target: Path) -> None:
    """A file or folder of the repository, without what .dockerignore keeps out."""
    origin = ROOT / source
    files = [path for path in origin.rglob("*") if path.is_file()] if origin.is_dir() else [origin]
    for path in files:
        if is_sent(str(path.relative_to(ROOT))):
            place = target / path.relative_to(origin) if origin.is_dir() else target
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place)


def build(dockerfiles: list[Path], folder: Path) -> dict[str, Image]:
    """The images of these files, by the file's name. What is in the folder from another time is made anew, but for the base."""
    if os.geteuid() != 0:
        raise PermissionError("chroot and mounts need root")
    folder.mkdir(parents=True, exist_ok=True)
    base, conf = folder / "base", folder / "pip.conf"
    began_s = time.monotonic()
    make_base(base)
    _say("base", time.monotonic() - began_s)
    conf.write_text(pip_settings()[1])

    def perform(dockerfile: Path) -> Image:
        place = folder / dockerfile.stem
        remove(place)
        place.mkdir()
        return Build(dockerfile, place, base, {"pip": conf}).run()

    with ThreadPoolExecutor() as pool:  # pip takes one processor
        return {path.stem: image for path, image in zip(dockerfiles, pool.map(perform, dockerfiles), strict=True)}


def remove(root: Path) -> None:
    """A root and all in it; tens of thousands of files, so not one by one from here."""
    subprocess.run(["rm", "-rf", "--one-file-system", root], check=True, timeout=STEP_LIMIT_S)


def _say(what: str, seconds: float) -> None:
    if seconds >= WORTH_TELLING_S:
        print(f"{seconds:6.1f} s  {what}", flush=True)


if __name__ == "__main__":
    for name, made in build([Path(path) for path in sys.argv[2:]], Path(sys.argv[1])).items():
        size_mb = int(
            subprocess.run(["du", "-sm", made.root], capture_output=True, text=True, check=True).stdout.split()[0]
        )
        print(f"{name}: {size_mb} MB; {shlex.join([*made.entrypoint, *made.cmd])}")
