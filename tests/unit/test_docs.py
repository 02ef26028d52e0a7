"""What the documents say is true: commands exist, links lead somewhere, tables are those of the code."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import rq.cli
import typer.main

import pipeline
from pipeline.cli.app import EXIT_CODES, make_app
from pipeline.config import Settings
from pipeline.exits import Exit
from pipeline.settings_file import collect_values, known_keys

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for path in REPOSITORY.rglob("*.md")
    if not any(part.startswith(".") or part == "node_modules" for part in path.relative_to(REPOSITORY).parts)
)
SOURCES = sorted(path for package in ("pipeline", "workers", "api") for path in (REPOSITORY / package).rglob("*.py"))
QUICK = ("baton config", "baton version")
POOLS = [*Settings().pools, "qwen"]


def shell_lines(document: Path) -> list[str]:
    """The commands in the document's ```sh blocks, continued lines joined, comments left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


COMMANDS = [(document.relative_to(REPOSITORY), line) for document in DOCUMENTS for line in shell_lines(document)]


def test_the_readme_shows_the_two_commands_first():
    assert [shlex.split(line, comments=True) for line in shell_lines(REPOSITORY / "README.md")[:2]] == [
        ["make", "up"],
        ["make", "test"],
    ]


@pytest.mark.parametrize(("document", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_a_command_of_a_document_is_known(document, line):
    words = list(itertools.dropwhile(lambda word: "=" in word, shlex.split(line, comments=True)))
    match re.sub(r"^\.venv(-vllm)?/bin/", "", words[0]):
        case "make":
            assert re.search(rf"^{words[1]}:.*## ", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        case "baton":
            parse(words[1:])
        case "export":
            name, _, value = words[1].partition("=")
            collect_values(None, {name: value}, [])
        case "curl":
            assert re.search(r"http://127\.0\.0\.1:8000/(v1/|health|ready|metrics)", line)
        case "bash":
            assert (REPOSITORY / words[1]).is_file()
        case "python" if words[1] == "-m":
            assert importlib.util.find_spec(words[2]), f"{document}: no module {words[2]}"
        case "rq":
            rq.cli.main.commands[words[1]].make_context(words[1], words[2:])
        case "docker":
            check_docker(words[1:])
        case "kubectl":
            check_kubectl(words[1:])
        case "pip" | "redis-cli":
            pass
        case _:
            pytest.fail(f"{document}: nothing here knows how to check {line!r}")


@pytest.mark.parametrize("line", [line for _, line in COMMANDS if line.startswith(QUICK) and "set-router" not in line])
def test_a_quick_command_of_a_document_runs(line):
    words = shlex.split(line, comments=True)
    command = [sys.executable, "-m", "pipeline.cli", *words[1:]]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_to_files(document):
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## \[(.+?)\]", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == pipeline.__version__
    assert f'version = "{pipeline.__version__}"' in (REPOSITORY / "pyproject.toml").read_text()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_module_says_what_it_is(source):
    assert ast.get_docstring(ast.parse(source.read_text()))


def test_settings_named_in_the_readme_exist():
    known = {key.path for key in known_keys(["<name>", *POOLS])}
    sections = {path.rpartition(".")[0] for path in known}
    named = re.findall(r"`([a-z]+\.[a-z_.<>]+[a-z])`", (REPOSITORY / "README.md").read_text())
    settings = [name for name in named if name.rpartition(".")[0] in sections]
    assert len(settings) > 3
    assert [name for name in settings if name not in known] == []


def test_the_exit_codes_in_the_readme_are_those_of_the_program():
    readme = " ".join((REPOSITORY / "README.md").read_text().split())
    assert EXIT_CODES in readme
    assert [int(number) for number in re.findall(r"(\d+) [a-z]", EXIT_CODES)] == [int(code) for code in Exit]


def parse(words: list[str]) -> None:
    """Parses a command line with the program's own parser, without running it."""
    command: click.Command = typer.main.get_command(make_app())
    context = click.Context(command, info_name="baton")
    while isinstance(command, click.Group):
        name, *words = words
        subcommand = command.get_command(context, name)
        assert subcommand is not None, f"no command {name}"
        command, context = subcommand, click.Context(subcommand, parent=context, info_name=name)
    command.make_context(command.name, list(words))
    overrides = [word for flag, word in itertools.pairwise(words) if flag == "--set"]
    collect_values(None, {}, overrides)


def check_docker(words: list[str]) -> None:
    """Files are there; behind an image or a service of ours stands a command of Baton."""
    flags = dict(itertools.pairwise(words))
    for flag, file in itertools.pairwise(words):
        assert flag != "-f" or (REPOSITORY / file).is_file(), f"no file {file}"
    assert flags.get("-t", f":{pipeline.__version__}").endswith(f":{pipeline.__version__}")
    for place in (word for word in words if word == "api" or word.startswith("baton-")):
        command = words[words.index(place) + 1 : words.index(">") if ">" in words else None]
        if "run" in words and command:
            parse(command)


def check_kubectl(words: list[str]) -> None:
    """What is applied is there; what is made has a name that manifests know."""
    flags = dict(itertools.pairwise(words))
    assert flags.get("-n", "baton") == "baton"
    if "apply" in words:
        assert (REPOSITORY / flags["-k"] / "kustomization.yaml").is_file()
    if "secret" in words:
        manifests = (path.read_text() for path in (REPOSITORY / "docker" / "k8s").rglob("*.yaml"))
        assert any(f": {flags['generic']}\n" in text for text in manifests)
