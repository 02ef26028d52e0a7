"""The tables of fields find what a cluster would drop in silence."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.deploy.fields import faults

OBJECT: dict[str, Any] = {
    "apiVersion": "keda.sh/v1alpha1",
    "kind": "ScaledObject",
    "metadata": {"name": "decode"},
    "spec": {
        "scaleTargetRef": {"name": "decode"},
        "maxReplicaCount": 8,
        "triggers": [
            {"type": "metrics-api", "metadata": {"url": "http://a", "valueLocation": "n", "targetValue": "1"}}
        ],
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The object with another value somewhere; None takes the field out."""
    made = copy.deepcopy(OBJECT)
    *folders, name = path.split(".")
    place: Any = made
    for folder in folders:
        place = place[int(folder) if folder.isdigit() else folder]
    if value is None:
        del place[name]
    else:
        place[name] = value
    return made


def test_a_right_one_has_no_fault() -> None:
    assert faults(OBJECT) == []


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("spec.maxReplicas", 3, "ScaledObject.spec.maxReplicas: unknown"),
        ("spec.maxReplicaCount", "3", "ScaledObject.spec.maxReplicaCount: '3' is no int"),
        ("spec.minReplicaCount", False, "ScaledObject.spec.minReplicaCount: False is no int"),
        ("spec.scaleTargetRef", None, "ScaledObject.spec.scaleTargetRef: missing"),
        ("spec.scaleTargetRef", "decode", "ScaledObject.spec.scaleTargetRef: 'decode' is no table"),
        ("spec.fallback", {"replicas": 1}, "ScaledObject.spec.fallback.failureThreshold: missing"),
        ("spec.triggers.0.metadata.targetValue", 1, "metrics-api.targetValue: 1 is no str"),
        ("spec.triggers.0.metadata.target", "1", "metrics-api.target: unknown"),
        (
            "spec.triggers.0.metadata.authMode",
            "token",
            "metrics-api.authMode: 'token' is none of apiKey, basic, bearer, tls",
        ),
        ("spec.triggers.0.type", "kafka", "trigger of type kafka"),
        ("spec.triggers.0.authentication", {}, "ScaledObject.spec.triggers[0].authentication: unknown"),
    ],
)
def test_a_fault_is_told_with_its_place(path: str, value: Any, fault: str) -> None:
    assert faults(changed(path, value)) == [fault]
