"""The compose files: the schema of the compose specification, and that they agree with the settings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pipeline
from api.__main__ import LAST_WORDS_S
from pipeline.settings_file import ENV_FILE, collect_values
from tests.deploy.reading import DOCKER, ROOT, Object, compose, objects_of, settings_of, stages_of

FILES = sorted(path.name for path in DOCKER.glob("compose*.yaml"))
HAND_BACK_S = 20  # behind the drain: what is held is handed back, the engine closed
UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}
BASE = compose("compose.yaml")
SERVICES = BASE["services"]
BATON = {name: service for name, service in SERVICES.items() if name != "redis"}
SETTINGS = settings_of(DOCKER / "config.toml")


def checked(document: Object, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the schema says; without YAML's tags, which it does not know."""
    (folder / "compose.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.json"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def seconds(text: str) -> int:
    assert re.fullmatch(r"\d+s", text)
    return int(text[:-1])


def with_defaults(text: str) -> str:
    """A text as compose reads it where no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def size(options: str) -> int:
    """The size in a tmpfs's options."""
    number, unit = re.search(r"size=(\d+)([kmg]?)", options).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]


def test_there_are_three() -> None:
    assert FILES == ["compose.gpu.yaml", "compose.public.yaml", "compose.yaml"]


@pytest.mark.parametrize("name", FILES)
def test_it_follows_the_specification(name: str, tmp_path: Path) -> None:
    result = checked(compose(name), tmp_path)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout


def test_what_does_not_follow_it_is_noticed(tmp_path: Path) -> None:
    assert checked({"services": {"api": {"imgae": "x"}}}, tmp_path).returncode == 1


def test_all_processes_of_a_machine_are_there() -> None:
    assert set(SERVICES) == {"redis", "api", "prefill", "decode", "batch"}
    commands = {name: service.get("command") for name, service in BATON.items()}
    assert commands == {"api": None, **{stage: ["worker", stage] for stage in ("prefill", "decode", "batch")}}


@pytest.mark.parametrize("name", FILES)
def test_its_variables_are_settings(name: str) -> None:
    for service in compose(name).get("services", {}).values():
        environment = {key: value for key, value in service.get("environment", {}).items() if key.startswith("BATON_")}
        assert all(isinstance(value, str) for value in environment.values())  # YAML's `off` would be false
        collect_values(None, environment, [])


@pytest.mark.parametrize("name", FILES)
def test_its_images_are_built_from_files_that_are_there(name: str) -> None:
    built = [service for service in compose(name)["services"].values() if "build" in service]
    for service in built:
        dockerfile = ROOT / service["build"]["dockerfile"]
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        assert service["image"] == f"baton-{dockerfile.stem}:{pipeline.__version__}"
        accepted = {
            step.value.partition("=")[0] for steps in stages_of(dockerfile) for step in steps if step.name == "ARG"
        }
        assert set(service["build"].get("args", {})) <= accepted


def test_it_ends_nobody_before_the_drain_is_over() -> None:
    grace_s = {name: seconds(service["stop_grace_period"]) for name, service in SERVICES.items()}
    assert grace_s["api"] > SETTINGS.api.shutdown_grace_s + LAST_WORDS_S + HAND_BACK_S - 5
    for stage in ("prefill", "decode"):
        assert grace_s[stage] > SETTINGS.worker.drain_s + HAND_BACK_S
    assert grace_s["batch"] > HAND_BACK_S
    assert grace_s["redis"] > HAND_BACK_S  # it writes what it has to its disk


def test_everybody_waits_for_a_healthy_redis_that_keeps_what_it_has() -> None:
    for service in BATON.values():
        assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}
    redis = SERVICES["redis"]
    words = redis["command"]
    assert redis["healthcheck"]["test"][0] == "CMD-SHELL"
    assert words[words.index("--appendonly") + 1] == "yes"
    assert words[words.index("--maxmemory-policy") + 1] == "noeviction"  # else requests vanish
    assert words[words.index("--save") + 1] == ""  # no snapshots beside it
    maxmemory = with_defaults(words[words.index("--maxmemory") + 1])
    assert size(f"size={with_defaults(redis['mem_limit'])}") >= 2 * size(f"size={maxmemory}")  # a rewrite copies
    assert redis["volumes"] == ["redis:/data"]
    assert re.fullmatch(r"redis:\d+\.\d+\.\d+-\w+", redis["image"])


def test_redis_is_reached_from_inside_alone() -> None:
    assert "ports" not in SERVICES["redis"]
    assert SERVICES["redis"]["networks"] == ["inside"]
    assert BASE["networks"]["inside"] == {"internal": True}


def test_without_keys_only_this_machine_reaches_the_api() -> None:
    (port,) = SERVICES["api"]["ports"]
    assert port.startswith("127.0.0.1:")
    assert port.endswith(f":{SETTINGS.api.port}")
    assert SERVICES["api"]["environment"]["BATON_API_AUTH"] == "off"
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["api"]


def test_where_others_reach_it_keys_are_needed() -> None:
    (name, public), *others = compose("compose.public.yaml")["services"].items()
    assert (name, others) == ("api", [])
    assert public["environment"] == {"BATON_API_AUTH": "auto"}
    # in place of the port of this machine: both would claim it
    assert "ports: !override" in (DOCKER / "compose.public.yaml").read_text()
    assert SETTINGS.api.host == "0.0.0.0"  # for which "auto" is "required"


def test_nothing_writes_outside_of_its_volumes() -> None:
    for service in SERVICES.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    for service in BATON.values():
        assert any(mount.startswith("/tmp:") for mount in service["tmpfs"])  # worker.beat_dir, temporary files
        assert "cache:/var/lib/baton/cache" in service["volumes"]
    used = {mount.partition(":")[0] for service in SERVICES.values() for mount in service["volumes"]}
    assert used == set(BASE["volumes"])


def test_the_api_and_batch_workers_share_the_files() -> None:
    for name in ("api", "batch"):
        assert f"files:{SETTINGS.files.url}" in SERVICES[name]["volumes"]


def test_the_batch_worker_is_asked_as_a_worker() -> None:
    worker = next(step for step in stages_of(DOCKER / "worker-cpu.Dockerfile")[-1] if step.name == "HEALTHCHECK")
    asked = SERVICES["batch"]["healthcheck"]["test"][1].replace("$$", "$")  # compose reads a $ as a variable of its own
    assert json.loads(worker.value.partition("CMD ")[2])[2] == asked


@pytest.mark.parametrize(
    ("name", "config", "volume"),
    [("compose.yaml", "config.toml", "blocks"), ("compose.gpu.yaml", "config.gpu.toml", "blocks-gpu")],
)
def test_blocks_have_room_in_the_memory_that_workers_share(name: str, config: str, volume: str) -> None:
    transfer = settings_of(DOCKER / config).transfer
    options = compose(name)["volumes"][volume]["driver_opts"]
    assert (options["type"], options["device"]) == ("tmpfs", "tmpfs")
    assert size(with_defaults(options["o"])) >= 2 * transfer.arena_bytes
    for stage in ("prefill", "decode"):
        assert f"{volume}:{transfer.dir}" in compose(name)["services"][stage]["volumes"]


def test_no_volume_is_made_in_two_sizes() -> None:
    # one that is there keeps its size, and what is mounted at the same place in a file over it takes its place
    assert not compose("compose.gpu.yaml")["volumes"].keys() & BASE["volumes"].keys()


def test_variables_of_compose_files_are_told_in_the_readme_with_what_they_are_by_themselves() -> None:
    told = (DOCKER / "README.md").read_text().partition("| variable | by itself |")[2].partition("\n\n")[0]
    for name in FILES:
        for variable, default in re.findall(r"\$\{(\w+):-([^}]*)\}", (DOCKER / name).read_text()):
            (row,) = [line for line in told.splitlines() if f"`{variable}`" in line.split("|")[1]]
            assert default in row.split("|")[2], variable


def test_on_gpus_all_have_the_settings_of_the_model() -> None:
    services = compose("compose.gpu.yaml")["services"]
    assert set(services) == set(BATON)
    (variable,) = [
        step.pairs[ENV_FILE] for step in stages_of(DOCKER / "worker-cuda.Dockerfile")[-1] if step.name == "ENV"
    ]
    assert all(f"./config.gpu.toml:{variable}:ro" in service["volumes"] for service in services.values())
    assert [pool.engine for pool in settings_of(DOCKER / "config.gpu.toml").pools.values()] == ["vllm"]
    assert settings_of(DOCKER / "config.gpu.toml").transfer.kind == "shm"  # no container sees another's GPU


def test_each_worker_has_a_gpu_of_its_own() -> None:
    services = compose("compose.gpu.yaml")["services"]
    reserved = [services[stage]["deploy"]["resources"]["reservations"]["devices"][0] for stage in ("prefill", "decode")]
    assert [device["device_ids"] for device in reserved] == [["0"], ["1"]]
    assert all(device["capabilities"] == ["gpu"] for device in reserved)


def test_settings_files_of_images_differ_only_where_they_say_so() -> None:
    plain, gpu = settings_of(DOCKER / "config.toml"), settings_of(DOCKER / "config.gpu.toml")
    assert (plain.api, plain.worker, plain.files, plain.log) == (gpu.api, gpu.worker, gpu.files, gpu.log)
    assert plain.transfer.tcp == gpu.transfer.tcp


def test_a_tag_of_yaml_is_no_text() -> None:
    with pytest.raises(yaml.YAMLError):
        objects_of("a: !secret b")
