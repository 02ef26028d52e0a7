"""Manifests: the schemas of Kubernetes, the tables of `fields.py`, and that they agree with the settings and with one another."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import pytest
import yaml

import pipeline
from api.__main__ import LAST_WORDS_S
from api.metrics import Metrics
from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.keys import PoolKeys
from pipeline.queue import STAGES
from pipeline.settings_file import ENV_FILE, collect_values, load_settings
from pipeline.snapshot import PoolSnapshot
from tests.deploy.fields import faults, is_known
from tests.deploy.reading import (
    DOCKER,
    K8S,
    Object,
    manifests,
    objects_of,
    of_kind,
    readme_yaml,
    rendered,
    rendered_overlay,
    settings_of,
    stages_of,
)

FOLDERS = ("base", "components/keda", "components/monitoring")
OVERLAYS = ("overlays/cpu", "overlays/gpu", "overlays/keda")
VERSIONS = ("1.32", "1.37")  # the oldest whose schemas we ask, and the newest
HAND_BACK_S = 20  # behind the drain: what is held is handed back, the engine closed
WORKLOADS = ("Deployment", "StatefulSet")
UNITS = {"Mi": 1024**2, "Gi": 1024**3}
IMAGE_VARIABLES = next(step.pairs for step in stages_of(DOCKER / "api.Dockerfile")[-1] if step.name == "ENV")

BASE = manifests("base")
SETTINGS = settings_of(K8S / "base" / "config.toml")


class Pods(NamedTuple):
    """A workload and its one container."""

    name: str
    workload: Object
    spec: Object
    container: Object

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.workload["spec"]["template"]["metadata"]["labels"]
        return labels

    def mounted(self, path: str) -> Object:
        """The volume at a path."""
        (name,) = [mount["name"] for mount in self.container["volumeMounts"] if mount["mountPath"] == path]
        (volume,) = [volume for volume in self.spec["volumes"] if volume["name"] == name]
        return dict(volume)


def pods_of(objects: list[Object]) -> dict[str, Pods]:
    found = {}
    for name, workload in of_kind(objects, *WORKLOADS).items():
        spec = workload["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        found[name] = Pods(name, workload, spec, container)
    return found


def variables_of(pods: Pods) -> dict[str, Any]:
    """Its variables: a text, or where in which secret the text is."""
    return {
        item["name"]: item["valueFrom"]["secretKeyRef"] if "valueFrom" in item else item["value"]
        for item in pods.container["env"]
    }


PODS = pods_of(BASE)
BATON = {name: pods for name, pods in PODS.items() if name != "redis"}


def schema_fault(found: Object, version: str) -> str:
    """What the schema of Kubernetes says of an object; empty: nothing."""
    try:
        kubernetes_validate.validate(found, version, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return f"{found['kind']}/{found['metadata']['name']}: {error}"
    return ""


def all_faults(objects: list[Object], version: str) -> list[str]:
    ours = [fault for found in objects if is_known(found) for fault in faults(found)]
    return ours + [fault for found in objects if not is_known(found) and (fault := schema_fault(found, version))]


def matches(selector: Object, labels: dict[str, str]) -> bool:
    return bool(selector["matchLabels"].items() <= labels.items())


def size(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


def texts(value: Any) -> Iterator[str]:
    """All texts of an object."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    elif isinstance(value, str):
        yield value


def test_yaml_is_written_as_agreed() -> None:
    command = [
        sys.executable,
        "-m",
        "yamllint",
        "--strict",
        "--config-file",
        str(DOCKER / ".yamllint.yaml"),
        str(DOCKER),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


# -- schemas ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_files_follow_the_schemas(folder: str, version: str) -> None:
    assert all_faults(manifests(folder), version) == []


@pytest.mark.parametrize("folder", OVERLAYS)
def test_what_kustomize_makes_of_them_follows_the_schemas(folder: str) -> None:
    assert all_faults(rendered(folder), VERSIONS[-1]) == []


def test_a_field_that_kubernetes_does_not_know_is_noticed() -> None:
    (found,) = objects_of("{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 1, prot: 2}]}}")
    assert "prot" in schema_fault(found, VERSIONS[-1])


# -- kustomize --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", OVERLAYS)
def test_an_overlay_is_all_of_baton_in_one_namespace(folder: str) -> None:
    objects = rendered(folder)
    assert set(pods_of(objects)) == {"redis", "api", "prefill", "decode", "batch"}
    assert {found["metadata"]["namespace"] for found in objects if found["kind"] != "Namespace"} == {"baton"}


@pytest.mark.parametrize("folder", OVERLAYS)
def test_an_overlay_runs_images_of_this_version(folder: str) -> None:
    images = {pods.container["image"] for pods in pods_of(rendered(folder)).values()}
    built = {f"baton-{path.stem}:{pipeline.__version__}" for path in DOCKER.glob("*.Dockerfile")}
    assert images - {PODS["redis"].container["image"]} <= built
    assert f"baton-api:{pipeline.__version__}" in images
    assert re.fullmatch(r"redis:\d+\.\d+\.\d+-\w+", PODS["redis"].container["image"])


@pytest.mark.parametrize("folder", OVERLAYS)
def test_pods_start_anew_with_settings_that_have_changed(folder: str) -> None:
    objects = rendered(folder)
    (name,) = of_kind(objects, "ConfigMap")
    assert re.fullmatch(r"baton-[a-z0-9]+", name)  # its text is in its name
    for pods in pods_of(objects).values():
        if pods.name != "redis":
            assert pods.mounted("/etc/baton")["configMap"]["name"] == name
    assert IMAGE_VARIABLES[ENV_FILE] == "/etc/baton/config.toml"


def test_the_readmes_overlay_scales_its_own_pool_and_takes_all_images_from_its_registry(tmp_path: Path) -> None:
    (kustomization,) = [block for block in readme_yaml() if "kind: Kustomization" in block]
    config = K8S / "overlays" / "gpu" / "config.toml"
    objects = rendered_overlay(tmp_path, kustomization, config.read_text())
    assert all_faults(objects, VERSIONS[-1]) == []
    (pool,) = settings_of(config).pools
    urls = [text for found in of_kind(objects, "ScaledObject").values() for text in texts(found) if "://" in text]
    assert urls == [f"http://api.baton.svc:{SETTINGS.api.port}/v1/scaling/{pool}"] * len(STAGES)
    images = {name: pods.container["image"] for name, pods in pods_of(objects).items() if name != "redis"}
    assert set(images.values()) == {
        f"registry.example/baton-{image}:{pipeline.__version__}" for image in ("api", "worker-cuda")
    }
    (settings,) = of_kind(objects, "ConfigMap").values()
    assert settings["data"]["config.toml"] == config.read_text()


def with_components(overlay: str, *components: str) -> str:
    """An overlay of somebody's own."""
    lines = ["resources:", f"  - ../baton/docker/k8s/overlays/{overlay}", "components:"]
    return "\n".join([*lines, *(f"  - ../baton/docker/k8s/components/{component}" for component in components)])


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "keda"])
def test_with_a_bucket_nobody_needs_the_claim(overlay: str, tmp_path: Path) -> None:
    objects = rendered_overlay(tmp_path, with_components(overlay, "bucket"))
    assert all_faults(objects, VERSIONS[-1]) == []
    assert of_kind(objects, "PersistentVolumeClaim") == {}
    pods, before = pods_of(objects), pods_of(rendered(f"overlays/{overlay}"))
    for name in ("api", "batch"):
        assert {volume["name"] for volume in before[name].spec["volumes"]} - {
            volume["name"] for volume in pods[name].spec["volumes"]
        } == {"files"}
        assert len(before[name].container["volumeMounts"]) - len(pods[name].container["volumeMounts"]) == 1
        assert SETTINGS.files.url not in texts(pods[name].spec)
        variables = variables_of(pods[name])
        assert variables["BATON_FILES_URL"] == {"name": "baton-bucket", "key": "url"}  # without it pods do not start
        assert variables["BATON_FILES_STORAGE_OPTIONS"] == {"name": "baton-bucket", "key": "options", "optional": True}
        collect_values(None, {"BATON_FILES_URL": "s3://b/p", "BATON_FILES_STORAGE_OPTIONS": "{}"}, [])
        assert variables.items() >= variables_of(before[name]).items()
    for stage in STAGES:
        assert pods[stage] == before[stage]


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "keda"])
def test_with_a_redis_of_somebody_else_ours_is_gone(overlay: str, tmp_path: Path) -> None:
    objects = rendered_overlay(tmp_path, with_components(overlay, "external-redis"))
    assert all_faults(objects, VERSIONS[-1]) == []
    assert [found["kind"] for found in objects if found["metadata"]["name"] == "redis"] == []
    pods, before = pods_of(objects), pods_of(rendered(f"overlays/{overlay}"))
    assert set(pods) == set(before) - {"redis"}
    for name in pods:
        address = {"BATON_REDIS_URL": {"name": "baton-redis", "key": "url"}}
        others = {
            key: value for key, value in variables_of(before[name]).items() if key not in (*address, "REDIS_PASSWORD")
        }
        assert variables_of(pods[name]) == {**others, **address}


def test_a_bucket_and_a_redis_of_somebody_else_go_together(tmp_path: Path) -> None:
    objects = rendered_overlay(tmp_path, with_components("gpu", "bucket", "external-redis"))
    assert all_faults(objects, VERSIONS[-1]) == []
    assert of_kind(objects, "PersistentVolumeClaim", "StatefulSet") == {}
    assert {"BATON_REDIS_URL", "BATON_FILES_URL"} <= variables_of(pods_of(objects)["api"]).keys()


def test_on_gpus_each_worker_asks_for_one_and_no_second_worker_has_to_fit_beside_it() -> None:
    pods = pods_of(rendered("overlays/gpu"))
    for stage in STAGES:
        assert pods[stage].container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert pods[stage].workload["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
        assert pods[stage].container["image"].startswith("baton-worker-cuda:")
    assert "nvidia.com/gpu" not in str(pods["api"].spec) + str(pods["batch"].spec)


def test_on_gpus_blocks_go_through_host_memory_and_a_start_takes_minutes() -> None:
    settings = settings_of(K8S / "overlays" / "gpu" / "config.toml")
    assert settings.transfer.kind == "tcp"
    assert settings.autoscale.start_s >= 300


def test_on_gpus_a_token_of_the_hub_is_read_where_there_is_one() -> None:
    pods = pods_of(rendered("overlays/gpu"))
    for name in BATON:
        token = {"name": "baton-hub", "key": "token", "optional": True}
        assert variables_of(pods[name])["HF_TOKEN"] == token


def test_the_readmes_patch_keeps_models_in_a_claim(tmp_path: Path) -> None:
    (patch,) = [block for block in readme_yaml() if block.startswith("# cache.yaml")]
    patches = {"patches": [{"patch": patch, "target": {"kind": "Deployment", "name": "prefill|decode"}}]}
    overlay = with_components("gpu", "keda") + "\n" + yaml.safe_dump(patches)
    objects = rendered_overlay(tmp_path, overlay)
    assert all_faults(objects, VERSIONS[-1]) == []
    for stage in STAGES:
        volume = pods_of(objects)[stage].mounted(IMAGE_VARIABLES["HOME"])
        assert volume == {"name": "cache", "persistentVolumeClaim": {"claimName": "baton-models"}}


@pytest.mark.parametrize("folder", ["base", "overlays/gpu"])
def test_settings_hold_for_images_and_the_rest(folder: str, tmp_path: Path) -> None:
    settings = settings_of(K8S / folder / "config.toml")
    image = settings_of(DOCKER / "config.toml")
    assert settings.worker.beat_dir == image.worker.beat_dir
    assert settings.api.port == image.api.port
    assert settings.transfer.tcp.port == image.transfer.tcp.port
    assert settings.worker.drain_s == SETTINGS.worker.drain_s
    assert settings.api == SETTINGS.api


# -- what runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BATON)
def test_its_variables_are_settings(name: str) -> None:
    variables = {item["name"]: item.get("value", "") for item in BATON[name].container["env"]}
    assert "BATON_REDIS_URL" in variables
    collect_values(None, {key: value for key, value in variables.items() if key.startswith("BATON_")}, [])
    names = [item["name"] for item in BATON[name].container["env"]]
    for later, value in variables.items():  # a variable reads only those before it
        for read in re.findall(r"\$\((\w+)\)", value):
            assert names.index(read) < names.index(later)


@pytest.mark.parametrize("name", PODS)
def test_services_add_no_variables(name: str) -> None:
    assert PODS[name].spec["enableServiceLinks"] is False


def test_a_service_called_baton_api_would_end_every_process() -> None:
    with pytest.raises(ConfigError, match="BATON_API_PORT"):
        load_settings(None, {"BATON_API_PORT": "tcp://10.0.0.1:8000"}, [])


@pytest.mark.parametrize("name", PODS)
def test_it_runs_without_root_and_writes_only_to_volumes(name: str) -> None:
    pod, container = PODS[name].spec["securityContext"], PODS[name].container["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] == (999 if name == "redis" else 10001)
    assert pod["fsGroup"] == pod["runAsGroup"] == pod["runAsUser"]
    assert pod["fsGroupChangePolicy"] == "OnRootMismatch"  # else each start walks through all files of a volume
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert PODS[name].spec["automountServiceAccountToken"] is False
    assert PODS[name].spec["serviceAccountName"] in of_kind(BASE, "ServiceAccount")
    (namespace,) = of_kind(BASE, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("name", PODS)
def test_what_it_asks_for_is_told(name: str) -> None:
    resources = PODS[name].container["resources"]
    assert set(resources["requests"]) == {"cpu", "memory"}
    assert size(resources["limits"]["memory"]) >= size(resources["requests"]["memory"])
    assert "cpu" not in resources["limits"]  # a worker that is stopped for a moment stops all its streams


def test_nobody_is_killed_before_the_drain_is_over() -> None:
    grace_s = {name: pods.spec["terminationGracePeriodSeconds"] for name, pods in PODS.items()}
    pre_stop_s = PODS["api"].container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert 5 <= pre_stop_s <= 15
    assert grace_s["api"] > pre_stop_s + SETTINGS.api.shutdown_grace_s + LAST_WORDS_S + HAND_BACK_S
    for stage in STAGES:
        assert grace_s[stage] > SETTINGS.worker.drain_s + HAND_BACK_S
    assert grace_s["batch"] > HAND_BACK_S
    assert grace_s["redis"] > HAND_BACK_S


@pytest.mark.parametrize("name", [*STAGES, "batch"])
def test_a_worker_is_asked_by_the_files_that_it_touches(name: str) -> None:
    container, beat = BATON[name].container, SETTINGS.worker.beat_dir
    asked = {
        kind: container[f"{kind}Probe"]["exec"]["command"][2]
        for kind in ("startup", "liveness", "readiness")
        if f"{kind}Probe" in container
    }
    ready, alive = (f"test -n \"$(find {beat}/{file} -newermt '-30 seconds')\"" for file in ("ready", "alive"))
    expected = {"readiness": ready} if name == "batch" else {"startup": alive, "liveness": alive, "readiness": ready}
    assert asked == expected
    assert BATON[name].mounted("/tmp")  # where beat_dir is
    assert beat.startswith("/tmp/")


def test_the_api_is_alive_without_redis_and_ready_with_it() -> None:
    container = BATON["api"].container
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/live", "liveness": "/live", "readiness": "/ready"}


def test_redis_keeps_what_it_has_and_has_room_to_write_it() -> None:
    args = PODS["redis"].container["args"]
    given = dict(zip(args[0::2], args[1::2], strict=True))
    assert (given["--appendonly"], given["--maxmemory-policy"]) == ("yes", "noeviction")
    assert given["--save"] == ""  # no snapshots beside it
    assert given["--requirepass"] == "$(REDIS_PASSWORD)"
    limit = size(PODS["redis"].container["resources"]["limits"]["memory"])
    assert size(given["--maxmemory"].replace("gb", "Gi")) * 2 <= limit
    (claim,) = PODS["redis"].workload["spec"]["volumeClaimTemplates"]
    mounted = {mount["name"]: mount["mountPath"] for mount in PODS["redis"].container["volumeMounts"]}
    assert mounted == {claim["metadata"]["name"]: "/data"}


@pytest.mark.parametrize("folder", ["base", "overlays/gpu"])
def test_blocks_have_room(folder: str) -> None:
    transfer = settings_of(K8S / folder / "config.toml").transfer
    pods = PODS if folder == "base" else pods_of(rendered(folder))
    for stage in STAGES:
        shm = pods[stage].mounted(transfer.dir)["emptyDir"]
        assert shm["medium"] == "Memory"
        assert size(shm["sizeLimit"]) > transfer.arena_bytes
        assert size(pods[stage].container["resources"]["limits"]["memory"]) > 2 * size(shm["sizeLimit"])


def test_the_api_and_batch_workers_share_the_files() -> None:
    for name in ("api", "batch"):
        claim = BATON[name].mounted(SETTINGS.files.url)["persistentVolumeClaim"]["claimName"]
        assert of_kind(BASE, "PersistentVolumeClaim")[claim]["spec"]["accessModes"] == ["ReadWriteMany"]


# -- who finds whom -------------------------------------------------------------------------------------------------------------


def test_services_lead_to_ports_that_are_listened_on() -> None:
    for name, service in of_kind(BASE, "Service").items():
        (pods,) = [pods for pods in PODS.values() if service["spec"]["selector"].items() <= pods.labels.items()]
        assert pods.name == name
        (port,) = service["spec"]["ports"]
        assert port["targetPort"] in [listened["name"] for listened in pods.container["ports"]]
        assert port["port"] == pods.container["ports"][0]["containerPort"]


def test_ports_are_those_of_the_settings() -> None:
    ports = {name: pods.container.get("ports", [{}])[0].get("containerPort") for name, pods in BATON.items()}
    assert ports == {"api": SETTINGS.api.port, "prefill": SETTINGS.transfer.tcp.port, "decode": None, "batch": None}


def test_who_may_reach_whom() -> None:
    policies = of_kind(BASE, "NetworkPolicy")
    assert policies.pop("nobody")["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}

    def opened(policy: str) -> tuple[list[str], list[str] | None, list[int]]:
        """To whom, for whom (None: all), on which ports."""
        spec = policies[policy]["spec"]
        (rule,) = spec["ingress"]
        callers = [part["podSelector"] for part in rule.get("from", ())]
        inside = [name for name, pods in PODS.items() if any(matches(caller, pods.labels) for caller in callers)]
        to = [name for name, pods in PODS.items() if matches(spec["podSelector"], pods.labels)]
        return to, sorted(inside) if "from" in rule else None, [port["port"] for port in rule["ports"]]

    assert opened("redis") == (["redis"], ["api", "batch", "decode", "prefill"], [6379])
    assert opened("transfer") == (["prefill"], ["decode"], [SETTINGS.transfer.tcp.port])
    assert opened("api") == (["api"], None, [SETTINGS.api.port])
    assert set(policies) == {"redis", "transfer", "api"}


@pytest.mark.parametrize("name", PODS)
def test_a_node_can_be_drained_and_not_all_at_once(name: str) -> None:
    budget = of_kind(BASE, "PodDisruptionBudget")[name]["spec"]
    assert matches(budget["selector"], PODS[name].labels)
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"  # one that never got ready holds up no node
    replicas = PODS[name].workload["spec"]["replicas"]
    assert budget.get("maxUnavailable", 0) == 1 or replicas > budget["minAvailable"] >= 1


@pytest.mark.parametrize("name", BATON)
def test_pods_of_a_kind_are_spread(name: str) -> None:
    spread = BATON[name].spec["topologySpreadConstraints"]
    assert spread[0]["topologyKey"] == "kubernetes.io/hostname"
    assert all(matches(part["labelSelector"], BATON[name].labels) for part in spread)


def test_secrets_are_told_in_the_readme_and_never_written_down() -> None:
    everything = [found for path in K8S.rglob("*.yaml") for found in objects_of(path.read_text())]
    assert [found for found in everything if found["kind"] == "Secret"] == []
    needed = {(part["name"], part["key"]) for part in _secret_keys(everything)}
    needed |= {("baton-hub", "token")}  # of a patch
    needed.remove(("baton-bucket", "options"))  # rarely
    (mounted,) = {BATON["api"].mounted("/etc/baton-keys")["secret"]["secretName"]}
    folder, _, file = SETTINGS.api.keys_file.rpartition("/")
    needed.add((mounted, file))
    assert folder == "/etc/baton-keys"
    (mount,) = [mount for mount in BATON["api"].container["volumeMounts"] if mount["mountPath"] == folder]
    assert "subPath" not in mount  # then a change of the secret would not get there
    assert needed == {
        ("baton-redis", "password"), ("baton-redis", "url"), ("baton-keys", "keys.toml"), ("baton-monitoring", "token"),
        ("baton-hub", "token"), ("baton-bucket", "url"), ("baton-bucket", "access-key-id"), ("baton-bucket", "secret-access-key"),
    }  # fmt: skip
    readme = (DOCKER / "README.md").read_text()
    for secret, key in needed:
        assert re.search(rf"create secret generic {secret} .*--from-(literal|file)=?\s*{re.escape(key)}=", readme), (
            secret
        )


def _secret_keys(value: Any) -> Iterator[dict[str, str]]:
    """Every table that names a secret and a key in it."""
    if isinstance(value, list):
        for inner in value:
            yield from _secret_keys(inner)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name in ("secretKeyRef", "credentials"):
                yield inner
            elif name == "secretTargetRef":
                yield from inner
            else:
                yield from _secret_keys(inner)


# -- scaling and metrics ----------------------------------------------------------------------------------------------------------


def test_keda_asks_the_api_how_many_workers_a_stage_should_have() -> None:
    service = of_kind(BASE, "Service")["api"]["spec"]["ports"][0]["port"]
    scaled = of_kind(manifests("components/keda"), "ScaledObject")
    assert set(scaled) == set(STAGES)
    for stage, found in scaled.items():
        (trigger,) = found["spec"]["triggers"]
        metadata = trigger["metadata"]
        (pool,) = SETTINGS.pools
        assert found["spec"]["scaleTargetRef"] == {"name": stage}
        assert metadata["url"] == f"http://api.baton.svc:{service}/v1/scaling/{pool}"
        assert metadata["valueLocation"] == f"stages.{stage}.desired"
        assert (trigger["metricType"], metadata["targetValue"]) == (
            "AverageValue",
            "1",
        )  # so the value is the number of replicas
        assert trigger["authenticationRef"]["name"] in of_kind(manifests("components/keda"), "TriggerAuthentication")


def test_keda_goes_to_zero_and_holds_while_the_api_is_silent() -> None:
    for found in of_kind(manifests("components/keda"), "ScaledObject").values():
        spec = found["spec"]
        assert spec["minReplicaCount"] == 0
        assert "idleReplicaCount" not in spec  # has to be below the minimum
        assert spec["fallback"]["behavior"] == "currentReplicasIfHigher"
        assert spec["fallback"]["replicas"] >= 1
        (policy,) = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]["policies"]
        assert (policy["type"], policy["value"]) == ("Pods", 1)


def test_the_calm_before_there_are_fewer_is_batons_and_what_keda_adds_is_short() -> None:
    policy = SETTINGS.autoscale
    for found in of_kind(manifests("components/keda"), "ScaledObject").values():
        behavior = found["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        window_s = behavior["scaleDown"]["stabilizationWindowSeconds"]
        assert policy.poll_s * 10 <= window_s <= policy.down_after_s / 4
        assert policy.poll_s * 10 <= found["spec"]["cooldownPeriod"] <= policy.idle_s / 4
        assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0


def test_the_readmes_way_without_the_endpoint_reads_a_lane_by_its_length() -> None:
    (spec,) = [found for block in readme_yaml() for found in objects_of(block) if "triggers" in found]
    found = of_kind(manifests("components/keda"), "ScaledObject")["decode"]
    assert faults({**found, "spec": {**found["spec"], **spec}}) == []
    (trigger,) = spec["triggers"]
    assert trigger["metadata"]["stream"] == PoolKeys("baton-tiny").lane("decode", "default")
    assert not {"consumerGroup", "lagCount", "pendingEntriesCount"} & set(trigger["metadata"])


def test_with_keda_nothing_else_says_how_many_workers_there_are() -> None:
    pods = pods_of(rendered("overlays/keda"))
    assert [name for name, found in pods.items() if "replicas" not in found.workload["spec"]] == ["decode", "prefill"]


def test_prometheus_asks_the_api() -> None:
    (monitor,) = of_kind(manifests("components/monitoring"), "ServiceMonitor").values()
    service = of_kind(BASE, "Service")["api"]
    assert matches(monitor["spec"]["selector"], service["metadata"]["labels"])
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert endpoint["path"] == "/metrics"


def test_metrics_that_are_named_exist() -> None:
    snapshot = PoolSnapshot(
        counters={"waiting:prefill:default": 1, "tokens:prefill:default": 1}, workers={"prefill": {"a": b""}}
    )
    told = Metrics().render({"baton-tiny": snapshot}, {}).decode()
    pages = [*DOCKER.glob("*.md"), *K8S.rglob("*.yaml")]
    named = {name for page in pages for name in re.findall(r"\bbaton_[a-z_]+", page.read_text())}
    assert named
    assert [name for name in named if f"\n{name}{{" not in told] == []


@pytest.mark.parametrize("path", sorted(DOCKER.rglob("*.toml")), ids=lambda path: str(path.relative_to(DOCKER)))
def test_settings_files_are_whole(path: Path) -> None:
    settings = settings_of(path)
    assert list(settings.pools) == list(tomllib.loads(path.read_text())["pools"])
    assert settings.redis.url == Settings().redis.url  # comes from a variable: it has a password
