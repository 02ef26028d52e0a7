"""The fields of objects whose schemas Kubernetes does not have: KEDA's and the Prometheus operator's, as far as Baton uses them.

A table is a dict of fields: a type, a set of texts that it may be, a table, or a list of one of these. A field whose name ends with
`!` must be there. Unknown fields are found: in a cluster they would be dropped without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Table = dict[str, Any]

META = {"name!": str, "namespace": str, "labels": dict, "annotations": dict}

RULES = {
    "stabilizationWindowSeconds": int,
    "selectPolicy": {"Max", "Min", "Disabled"},
    "policies": [{"type!": {"Pods", "Percent"}, "value!": int, "periodSeconds!": int}],
}

SCALED_OBJECT = {
    "scaleTargetRef!": {"name!": str, "apiVersion": str, "kind": str, "envSourceContainerName": str},
    "pollingInterval": int,
    "initialCooldownPeriod": int,
    "cooldownPeriod": int,
    "idleReplicaCount": int,
    "minReplicaCount": int,
    "maxReplicaCount": int,
    "fallback": {
        "failureThreshold!": int,
        "replicas!": int,
        "behavior": {"static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"},
    },
    "advanced": {
        "restoreToOriginalReplicaCount": bool,
        "horizontalPodAutoscalerConfig": {"name": str, "behavior": {"scaleUp": RULES, "scaleDown": RULES}},
        "scalingModifiers": {"formula": str, "target": str, "activationTarget": str, "metricType": str},
    },
    "triggers!": [
        {
            "type!": str,
            "name": str,
            "metricType": {"AverageValue", "Value", "Utilization"},
            "useCachedMetrics": bool,
            "metadata!": dict,
            "authenticationRef": {"name!": str, "kind": {"TriggerAuthentication", "ClusterTriggerAuthentication"}},
        }
    ],
}

# Of each scaler; all values are texts. From trigger or authentication: token and password never stand in a trigger.
TRIGGERS: dict[str, Table] = {
    "metrics-api": {
        "url!": str,
        "valueLocation!": str,
        "targetValue!": str,
        "activationTargetValue": str,
        "format": {"json", "xml", "yaml", "prometheus"},
        "authMode": {"apiKey", "basic", "tls", "bearer"},
        "unsafeSsl": str,
    },
    "redis-streams": {
        "stream!": str,
        "address": str,
        "host": str,
        "port": str,
        "consumerGroup": str,
        "pendingEntriesCount": str,
        "streamLength": str,
        "lagCount": str,
        "activationLagCount": str,
        "databaseIndex": str,
        "enableTLS": str,
        "unsafeSsl": str,
        "usernameFromEnv": str,
        "passwordFromEnv": str,
    },
}

TRIGGER_AUTHENTICATION = {
    "secretTargetRef": [{"parameter!": str, "name!": str, "key!": str}],
    "env": [{"parameter!": str, "name!": str, "containerName": str}],
}

SERVICE_MONITOR = {
    "selector!": {"matchLabels": dict, "matchExpressions": list},
    "namespaceSelector": {"any": bool, "matchNames": list},
    "jobLabel": str,
    "endpoints!": [
        {
            "port": str,
            "path": str,
            "interval": str,
            "scrapeTimeout": str,
            "scheme": {"http", "https"},
            "honorLabels": bool,
            "authorization": {"type": str, "credentials!": {"name!": str, "key!": str}},
        }
    ],
}

KINDS: dict[tuple[str, str], Table] = {
    ("keda.sh/v1alpha1", "ScaledObject"): SCALED_OBJECT,
    ("keda.sh/v1alpha1", "TriggerAuthentication"): TRIGGER_AUTHENTICATION,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): SERVICE_MONITOR,
}


def is_known(found: dict[str, Any]) -> bool:
    """Whether an object is of a kind of these tables."""
    return (found["apiVersion"], found["kind"]) in KINDS


def faults(found: dict[str, Any]) -> list[str]:
    """What is wrong with an object of these kinds."""
    spec = KINDS[found["apiVersion"], found["kind"]]
    whole = {"apiVersion!": str, "kind!": str, "metadata!": META, "spec!": spec}
    return [*_faults(found, whole, found["kind"]), *_of_triggers(found)]


def _of_triggers(found: dict[str, Any]) -> Iterator[str]:
    for trigger in found["spec"].get("triggers", ()):
        if trigger["type"] not in TRIGGERS:
            yield f"trigger of type {trigger['type']}"
        else:
            yield from _faults(trigger["metadata"], TRIGGERS[trigger["type"]], trigger["type"])


def _faults(value: Any, table: Any, where: str) -> Iterator[str]:
    match table:
        case dict() if not isinstance(value, dict):
            yield f"{where}: {value!r} is no table"
        case dict():
            known = {name.removesuffix("!"): inner for name, inner in table.items()}
            yield from (f"{where}.{name}: unknown" for name in value if name not in known)
            needed = [name[:-1] for name in table if name.endswith("!")]
            yield from (f"{where}.{name}: missing" for name in needed if name not in value)
            for name in value.keys() & known.keys():
                yield from _faults(value[name], known[name], f"{where}.{name}")
        case [inner]:
            if not isinstance(value, list):
                yield f"{where}: {value!r} is no list"
                return
            for number, part in enumerate(value):
                yield from _faults(part, inner, f"{where}[{number}]")
        case set() if value not in table:
            yield f"{where}: {value!r} is none of {', '.join(sorted(table))}"
        case type() if not isinstance(value, table) or (table is int and isinstance(value, bool)):
            yield f"{where}: {value!r} is no {table.__name__}"
