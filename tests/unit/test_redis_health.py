"""What is wrong with a Redis, from what it says of itself."""

from __future__ import annotations

import pytest

from pipeline.findings import Finding, Grade
from pipeline.redis_health import ServerFacts, check_version, judge

GOOD_INFO = {
    "redis_version": "8.2.3", "role": "master", "used_memory": "1000000", "maxmemory": "0",
    "aof_last_write_status": "ok", "rdb_last_bgsave_status": "ok",
}  # fmt: skip
GOOD_SETTINGS: dict[str, str | None] = {
    "maxmemory-policy": "noeviction",
    "maxmemory": "0",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "client-output-buffer-limit": "normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60",
}


def found(info: dict[str, str], settings: dict[str, str | None], ping_ms: float = 1.0) -> dict[str, Finding]:
    return {
        finding.check: finding for finding in judge(ServerFacts(GOOD_INFO | info, GOOD_SETTINGS | settings, ping_ms))
    }


def test_a_private_server_is_in_order() -> None:
    assert {finding.grade for finding in found({}, {}).values()} == {Grade.OK}


@pytest.mark.parametrize(
    ("change", "check", "grade"),
    [
        ({"maxmemory-policy": "allkeys-lru"}, "redis eviction", Grade.ERROR),
        ({"appendonly": "no"}, "redis durability", Grade.WARNING),
        ({"client-output-buffer-limit": "pubsub 1048576 0 0"}, "redis pub/sub buffer", Grade.WARNING),
    ],
)
def test_a_bad_setting_is_named_with_its_fix(change: dict[str, str | None], check: str, grade: Grade) -> None:
    finding = found({}, change)[check]
    assert finding.grade is grade
    assert finding.fix


@pytest.mark.parametrize(
    ("change", "check", "grade"),
    [
        ({"redis_version": "6.0.16"}, "redis version", Grade.ERROR),
        ({"role": "slave"}, "redis role", Grade.ERROR),
        ({"used_memory": "950", "maxmemory": "1000"}, "redis memory", Grade.WARNING),
        ({"used_memory": "1001", "maxmemory": "1000"}, "redis memory", Grade.ERROR),
        ({"used_memory": "100", "maxmemory": "1000"}, "redis memory", Grade.OK),
        ({"aof_last_write_status": "err"}, "redis disk", Grade.ERROR),
    ],
)
def test_what_it_says_of_itself_is_judged(change: dict[str, str], check: str, grade: Grade) -> None:
    finding = found(change, {})[check]
    assert finding.grade is grade
    assert bool(finding.fix) is (grade is not Grade.OK)


def test_a_slow_answer_is_told() -> None:
    assert found({}, {}, ping_ms=250)["redis latency"].grade is Grade.WARNING


def test_a_server_that_keeps_its_settings_to_itself_is_no_problem() -> None:
    findings = found({}, dict.fromkeys(GOOD_SETTINGS))
    assert findings["redis settings"] == Finding(
        "redis settings", Grade.OK, "not told: this server keeps its settings to itself"
    )
    assert {finding.grade for finding in findings.values()} == {Grade.OK}


def test_the_version_of_valkey_is_its_own() -> None:
    valkey = {"server_name": "valkey", "redis_version": "7.2.4", "valkey_version": "8.0.1"}
    assert check_version(valkey) == Finding("redis version", Grade.OK, "valkey 8.0.1 runs")
