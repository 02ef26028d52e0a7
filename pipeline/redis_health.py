"""What is wrong with a Redis: `judge` is pure, `look` asks one server for what it needs. `baton doctor` prints the findings,
`/health` of the API tells those that are not in order.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator, Mapping

import structlog

from pipeline.connection import Connection
from pipeline.errors import BatonError
from pipeline.findings import Finding, Grade
from pipeline.redis_server import MIN_VERSION

log = structlog.get_logger("baton.redis")

SETTINGS = ("maxmemory-policy", "maxmemory", "appendonly", "appendfsync", "client-output-buffer-limit")
SLOW_MS = 100.0  # an answer to PING that takes longer is told
NEARLY_FULL = 0.9  # of maxmemory
LOOK_EACH_S = 5.0
_MIN_PUBSUB_BUFFER_BYTES = 8_388_608  # a slow API process is cut off when this much waits for it


@dataclasses.dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself: INFO by field, CONFIG GET by name (None: not told), and how long PING took."""

    info: Mapping[str, str]
    settings: Mapping[str, str | None]
    ping_ms: float = 0.0


async def look(connection: Connection) -> ServerFacts:
    """Ask a server. Raises `RedisUnavailable`; a managed server that keeps its settings to itself does not tell them."""
    await connection.command("PING")  # connects
    started_s = time.perf_counter()
    await connection.command("PING")
    ping_ms = (time.perf_counter() - started_s) * 1000
    info: dict[str, str] = {}
    for section in ("server", "memory", "replication", "persistence"):
        info |= _fields(await connection.command("INFO", section))
    settings = {name: _config_value(await connection.told("CONFIG", "GET", name)) for name in SETTINGS}
    return ServerFacts(info, settings, ping_ms)


def judge(facts: ServerFacts) -> list[Finding]:
    """All findings, good ones too, in the order in which they matter."""
    return [
        check_version(facts.info),
        check_role(facts.info),
        check_latency(facts.ping_ms),
        *check_settings(facts.settings),
        check_memory(facts.info),
        check_persistence(facts.info),
    ]


def check_version(info: Mapping[str, str]) -> Finding:
    """Whether the scripts run on it; `info` holds the section `server`."""
    kind = "valkey" if info.get("server_name") == "valkey" else "redis"
    version = info.get("valkey_version" if kind == "valkey" else "redis_version", "0")
    needed = MIN_VERSION[kind]
    if tuple(map(int, version.split(".")[:2])) < needed:
        text = f"{kind} {version} runs, but {'.'.join(map(str, needed))} is needed"
        return Finding("redis version", Grade.ERROR, text, "upgrade the server")
    return Finding("redis version", Grade.OK, f"{kind} {version} runs")


def check_role(info: Mapping[str, str]) -> Finding:
    """Whether it takes writes; `info` holds the section `replication`."""
    role = info.get("role", "master")
    if role == "master":
        return Finding("redis role", Grade.OK, f"master with {info.get('connected_slaves', '0')} replicas")
    fix = "point redis.url at the master, or at the Sentinels: redis+sentinel://host:26379/mymaster"
    return Finding("redis role", Grade.ERROR, f"it is a replica ({role}) and takes no writes", fix)


def check_latency(ping_ms: float) -> Finding:
    """Whether it answers as fast as every token needs it to."""
    text = f"PING took {ping_ms:.1f} ms"
    if ping_ms <= SLOW_MS:
        return Finding("redis latency", Grade.OK, text)
    fix = "look for slow commands (redis-cli slowlog get), a busy CPU, swapping, a slow disk or a far host"
    return Finding("redis latency", Grade.WARNING, f"{text}: it is slow or blocked", fix)


def check_settings(values: Mapping[str, str | None]) -> Iterator[Finding]:
    """`values` of CONFIG GET; None for what the server does not tell (managed servers)."""
    policy, appendonly, fsync = values["maxmemory-policy"], values["appendonly"], values["appendfsync"]
    if policy is None or appendonly is None:
        yield Finding("redis settings", Grade.OK, "not told: this server keeps its settings to itself")
        return
    if policy == "noeviction":
        yield Finding("redis eviction", Grade.OK, "noeviction: nothing that was accepted is thrown away")
    else:
        fix = "redis-cli config set maxmemory-policy noeviction"
        yield Finding("redis eviction", Grade.ERROR, f"{policy} may throw accepted requests away", fix)
    if appendonly == "yes":
        lost = "nothing" if fsync == "always" else "its last second"
        yield Finding("redis durability", Grade.OK, f"AOF on, appendfsync {fsync}: a power cut may cost {lost}")
    else:
        fix = "redis-cli config set appendonly yes"
        yield Finding("redis durability", Grade.WARNING, "AOF is off: a restart forgets accepted requests", fix)
    yield _check_pubsub_buffer(values["client-output-buffer-limit"] or "")


def _check_pubsub_buffer(limits: str) -> Finding:
    """`limits` is "normal 0 0 0 slave ... pubsub <hard> <soft> <seconds>"; 0 is no limit."""
    words = limits.split()
    hard_bytes, soft_bytes = (int(word) for word in words[words.index("pubsub") + 1 :][:2]) if words else (0, 0)
    if all(limit == 0 or limit >= _MIN_PUBSUB_BUFFER_BYTES for limit in (hard_bytes, soft_bytes)):
        return Finding("redis pub/sub buffer", Grade.OK, f"{hard_bytes >> 20} MiB hard, {soft_bytes >> 20} MiB soft")
    text = f"pubsub {hard_bytes} {soft_bytes} bytes: a busy API process would be cut off and read from the token logs"
    fix = "redis-cli config set client-output-buffer-limit 'pubsub 32mb 8mb 60'"
    return Finding("redis pub/sub buffer", Grade.WARNING, text, fix)


def check_memory(info: Mapping[str, str]) -> Finding:
    """How much of its limit is used; `info` holds the section `memory`."""
    used, limit = int(info.get("used_memory", "0")), int(info.get("maxmemory", "0"))
    if not limit:
        return Finding("redis memory", Grade.OK, f"{used / 2**20:.0f} MiB used, maxmemory: no limit")
    text = f"{used / 2**20:.0f} of {limit / 2**20:.0f} MiB used"
    if used < NEARLY_FULL * limit:
        return Finding("redis memory", Grade.OK, text)
    fix = "raise maxmemory, or lower queue.max_waiting_tokens and queue.result_ttl_s"
    full = "it is full, new requests are refused" if used >= limit else "it is nearly full"
    return Finding("redis memory", Grade.ERROR if used >= limit else Grade.WARNING, f"{text}: {full}", fix)


def check_persistence(info: Mapping[str, str]) -> Finding:
    """Whether it can write what it keeps; `info` holds the section `persistence`."""
    failed = [name for name in ("aof_last_write_status", "rdb_last_bgsave_status") if info.get(name, "ok") != "ok"]
    if not failed:
        return Finding("redis disk", Grade.OK, "the last write to disk succeeded")
    fix = "look into its log; it needs room on its disk"
    return Finding("redis disk", Grade.ERROR, f"{' and '.join(failed)}: err, it may refuse writes", fix)


class RedisWatch:
    """Looks at Redis at an interval, so that who asks for its health never waits for it. `run` until cancelled."""

    def __init__(self, connection: Connection, each_s: float = LOOK_EACH_S) -> None:
        self._connection = connection
        self._each_s = each_s
        self._known: set[str] = set()  # checks whose failure was said in the log
        self.problems: list[
            str
        ] = []  # of the last look; whether Redis answers at all is told by those who need its answer

    async def run(self) -> None:
        """Look, and wait, for ever."""
        while True:
            try:
                findings = judge(await look(self._connection))
            except BatonError as error:
                log.warning("cannot look at Redis, trying again", error=str(error))
            else:
                self._take([finding for finding in findings if finding.grade is not Grade.OK])
            await asyncio.sleep(self._each_s)

    def _take(self, bad: list[Finding]) -> None:
        problems = {finding.check: f"{finding.check}: {finding.text}; {finding.fix}" for finding in bad}
        if new := [problem for check, problem in problems.items() if check not in self._known]:
            log.warning("something is wrong with Redis", problems=new)
        self._known = set(problems)
        self.problems = list(problems.values())


def _fields(info: bytes | str | dict[object, object]) -> dict[str, str]:
    if isinstance(info, dict):  # some client versions parse INFO
        return {str(name): str(value) for name, value in info.items()}
    text = info.decode() if isinstance(info, bytes) else info
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def _config_value(answer: object) -> str | None:
    """The value of CONFIG GET with one name: a list of two, or a map in some client versions; None when it is withheld."""
    pairs = list(answer.values()) if isinstance(answer, dict) else list(answer)[1:] if isinstance(answer, list) else []
    if not pairs:
        return None
    return pairs[0].decode() if isinstance(pairs[0], bytes) else str(pairs[0])
