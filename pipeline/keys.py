"""Every Redis key and channel of Baton, with its type, its owner (who creates and deletes it) and its life.

All keys of a pool begin with `{pool}:`, so that a pool lies on one node of a cluster and scripts may touch several of them.
The Lua scripts get the same names from `lua_prelude`: this table is their only source.
"""

from __future__ import annotations

import dataclasses
import re

GROUP = "workers"  # the one consumer group of every lane
PARKED = (
    "-"  # the consumer that holds deliveries which nobody works on: passed over, handed back, or lost by a dead worker
)
DELAYED = "~"  # the consumer that holds deliveries which wait for their next try


@dataclasses.dataclass(frozen=True, slots=True)
class KeySpec:
    """One row of the key table; `{0}`, `{1}` in the template are the arguments."""

    template: str
    kind: str
    owner: str
    life: str


TABLE: dict[str, KeySpec] = {
    "req": KeySpec(
        "req:{0}", "hash", "admit", "no TTL while it lives; the end sets `queue.result_ttl_s`, or `queue.dead_ttl_s`"
    ),
    "log": KeySpec("log:{0}:{1}", "string of packed u32", "handover, step", "as its request"),
    "probs": KeySpec("probs:{0}:{1}", "string of records", "handover, step", "as its request"),
    "pprobs": KeySpec("pprobs:{0}", "string of records", "prompt", "as its request"),
    "lane": KeySpec("q:{0}:{1}", "stream", "admit, handover", "kept; an entry is deleted when acked"),
    "deadlines": KeySpec("deadlines", "zset id -> ms", "admit", "member until the request ends"),
    "counters": KeySpec("counters", "hash", "all scripts", "kept"),
    "delayed": KeySpec(
        "delayed", "zset id -> ms", "admit, handback", "member until its time has come or its request ends"
    ),
    "orphans": KeySpec(
        "orphans", "zset id -> ms", "linger, sweep", "member until a reader comes back or the request ends"
    ),
    "served": KeySpec(
        "served:{0}", "set of ids", "admit", "member until the request ends or the sweep finds its API gone"
    ),
    "held": KeySpec(
        "held:{0}", "set of ids", "admit", "member until the request ends: what waits and runs of one API key"
    ),
    "stages": KeySpec("stages", "set of names", "admit, renew", "kept"),
    "swept": KeySpec("swept", "hash", "sweep", "kept"),
    "settings": KeySpec("settings", "hash", "operator", "kept"),
    "alive": KeySpec(
        "alive:{0}", "zset name -> expiry ms", "renew", "member until it leaves or the sweep finds it expired"
    ),
    "worker": KeySpec("worker:{0}", "hash", "renew, claim", "three leases after the last renewal"),
    "idem": KeySpec("idem:{0}", "string id", "admit", "as its request"),
    "dead": KeySpec(
        "dead",
        "stream",
        "sweep, handback",
        "last 10,000, or until `drop` or a replay; their records stay for `queue.dead_ttl_s`",
    ),
    "kv": KeySpec("kv", "stream", "workers", "last 10,000 entries: what their prefix caches hold"),
    "purged": KeySpec("purged:{0}", "hash cursor -> answer", "purge", "a minute"),
    "sweep": KeySpec("sweeper", "string", "sweep", "one sweep interval: one sweeper at a time"),
    "scaler": KeySpec("scaler", "string", "lead", "its holder's lease: one `baton autoscale` a pool"),
    "scaling": KeySpec("scaling", "hash", "desire", "kept: what was decided last, and how often it was another number"),
    "crew": KeySpec("crew", "hash name -> stage, by whom", "`baton autoscale`", "field until its worker has ended"),
    "bus": KeySpec("bus:{0}", "channel", "-", "frames for one API process"),
    "tok": KeySpec("tok:{0}", "channel", "-", "frames of one watched request"),
    "ctl": KeySpec("ctl:{0}", "channel", "-", "notes to one worker: cancel, free"),
    "bell": KeySpec(
        "bell:{0}",
        "channel",
        "-",
        "rings the workers of a stage; `pool` rings the clients: who lives or a setting has changed",
    ),
    "ask": KeySpec("ask", "channel", "-", "questions to all workers of the pool"),
    "told": KeySpec("told:{0}", "channel", "-", "the workers' answers to one question"),
    "events": KeySpec("events", "channel", "-", "what happened to tasks and workers, as it happens"),
}

API_KEYS_ROOT = "{@keys}:"  # a hash tag that is no pool's name: API keys hold in all pools
FILES_ROOT = "{@files}:"  # and so do files
BATCHES_ROOT = "{@batches}:"  # and batches
RATES_ROOT = "@rates"  # of the `limits` library, whose keys have the id of an API key as their hash tag

# What belongs to no pool.
SHARED: dict[str, KeySpec] = {
    "all": KeySpec(API_KEYS_ROOT + "all", "hash digest -> API key", "`baton keys`", "kept, revoked ones too"),
    "version": KeySpec(API_KEYS_ROOT + "version", "string us", "`baton keys`", "kept: when a key was changed last"),
    "rates": KeySpec(
        RATES_ROOT + ":{LIMITER/<id of the key>/...}",
        "counter",
        "API, by the `limits` library",
        "two minutes after its last use",
    ),
    "file": KeySpec(FILES_ROOT + "file:{0}", "hash", "put_file", "until it is deleted or swept after its end"),
    "file_list": KeySpec(FILES_ROOT + "list:{0}:{1}", "zset of ids", "put_file", "member as its file"),
    "file_expiries": KeySpec(FILES_ROOT + "expiries", "zset id -> s", "put_file", "member as its file"),
    "files_folder": KeySpec(FILES_ROOT + "folder", "string", "API, batch worker", "kept: where its bytes are"),
    "files_sweeper": KeySpec(FILES_ROOT + "sweeper", "string", "API", "one sweep interval: one sweeper at a time"),
    "batch": KeySpec(BATCHES_ROOT + "batch:{0}", "hash", "put_batch", "`batches.keep_s` after its end"),
    "batch_list": KeySpec(
        BATCHES_ROOT + "list:{0}",
        "zset of ids",
        "put_batch",
        "member until its owner lists them, or makes more, after its batch is gone",
    ),
    "batches_open": KeySpec(BATCHES_ROOT + "open", "zset of ids", "put_batch", "member until its batch has ended"),
    "batches_untold": KeySpec(
        BATCHES_ROOT + "untold", "zset id -> s", "batch worker", "member until its receiver was told of its end"
    ),
    "batch_lease": KeySpec(
        BATCHES_ROOT + "lease:{0}", "string name", "take_batch", "`batches.lease_s`, held by its worker"
    ),
    "batch_done": KeySpec(BATCHES_ROOT + "done:{0}", "bitmap of lines", "put_part", "until its batch has ended"),
    "batch_parts": KeySpec(
        BATCHES_ROOT + "parts:{0}", "list of places", "put_part", "until its batch has ended and they are removed"
    ),
    "batch_spent": KeySpec(
        BATCHES_ROOT + "spent:{0}",
        "set of request ids",
        "put_part",
        "until these requests are erased: their answers are in parts",
    ),
    "batches_untidy": KeySpec(
        BATCHES_ROOT + "untidy", "set of ids", "put_part", "member until a worker has tidied up behind its batch"
    ),
    "batch_idem": KeySpec(BATCHES_ROOT + "idem:{0}", "string id", "put_batch", "a day"),
}


def api_keys() -> str:
    """Hash: every API key by the SHA-256 of its secret."""
    return _shared("all")


def api_keys_version() -> str:
    """String: when an API key was changed last, so that processes know when to read them again."""
    return _shared("version")


def _shared(name: str, *parts: str) -> str:
    """`str.format` would take the hash tag for an argument."""
    key = SHARED[name].template
    for number, part in enumerate(parts):
        key = key.replace(f"{{{number}}}", part)
    return key


def file_record(file_id: str) -> str:
    """Hash: what is known of a file."""
    return _shared("file", file_id)


def file_list(owner: str, purpose: str) -> str:
    """Sorted set: the ids of an owner's files, in the order of their making; `purpose` empty: of all purposes."""
    return _shared("file_list", owner, purpose)


def file_expiries() -> str:
    """Sorted set: files by when they expire, in s since 1970."""
    return _shared("file_expiries")


def files_folder() -> str:
    """String: the folder of the store that holds the bytes of this Redis's files."""
    return _shared("files_folder")


def files_sweeper() -> str:
    """String: somebody sweeps files in this interval."""
    return _shared("files_sweeper")


def batch_record(batch_id: str) -> str:
    """Hash: what is known of a batch."""
    return _shared("batch", batch_id)


def batch_list(owner: str) -> str:
    """Sorted set: the ids of an owner's batches, in the order of their making."""
    return _shared("batch_list", owner)


def batches_open() -> str:
    """Sorted set: the ids of all batches that have not ended."""
    return _shared("batches_open")


def batches_untold() -> str:
    """Sorted set: batches of whose end somebody is to be told, by the time of the next try."""
    return _shared("batches_untold")


def batch_lease(batch_id: str) -> str:
    """String: who works on a batch."""
    return _shared("batch_lease", batch_id)


def batch_done(batch_id: str) -> str:
    """Bitmap: the lines of a batch whose results are in its parts."""
    return _shared("batch_done", batch_id)


def batch_parts(batch_id: str) -> str:
    """List: the places of a batch's parts."""
    return _shared("batch_parts", batch_id)


def batch_spent(batch_id: str) -> str:
    """Set: requests whose answers are in parts."""
    return _shared("batch_spent", batch_id)


def batches_untidy() -> str:
    """Set: the ids of batches that have parts, or requests that nobody needs."""
    return _shared("batches_untidy")


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_pool_name(name: str) -> bool:
    """Whether a name may be a pool's: it becomes a hash tag, a model id and a part of request ids."""
    return _NAME.fullmatch(name) is not None


RESERVED_QUEUES = ("prefill", "decode", "api", "pool")  # Baton's own stages, and names that channels use


def is_own_queue(name: str) -> bool:
    """Whether a name may be that of a queue of one's own."""
    return is_pool_name(name) and name not in RESERVED_QUEUES


def wrong_queue(name: str) -> str:
    """Why a name cannot be that of a queue of one's own; empty where it can."""
    if is_own_queue(name):
        return ""
    reserved = ", ".join(RESERVED_QUEUES)
    return (
        f"{name!r} cannot be a queue of one's own: its name is 1 to 64 letters, digits, dots, _ and -, begins with a letter or "
        f"digit, and is none of {reserved}"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class PoolKeys:
    """The keys of one pool."""

    pool: str

    @property
    def root(self) -> str:
        """The prefix of all keys, passed to every script as its only KEYS entry."""
        return "{" + self.pool + "}:"

    def _of(self, name: str, *parts: str | int) -> str:
        return self.root + TABLE[name].template.format(*parts)

    def request(self, request_id: str) -> str:
        """Hash: the request and where it stands."""
        return self._of("req", request_id)

    def log(self, request_id: str, choice: int) -> str:
        """String: packed token ids of one choice."""
        return self._of("log", request_id, choice)

    def first_of_key(self, idempotency_key: str) -> str:
        """String: the request that an idempotency key stands for."""
        return self._of("idem", idempotency_key)

    def logprobs(self, request_id: str, choice: int) -> str:
        """String: log probabilities of one choice, where they were asked for; one record for each of its tokens."""
        return self._of("probs", request_id, choice)

    def prompt_logprobs(self, request_id: str) -> str:
        """String: log probabilities of the prompt, where they were asked for; one record for each of its tokens but the first."""
        return self._of("pprobs", request_id)

    def lane(self, stage: str, lane: str) -> str:
        """Stream: waiting and running tasks of a stage; `lane` is high, default, low or `@worker`."""
        return self._of("lane", stage, lane)

    def deadlines(self) -> str:
        """Sorted set: when each living request must have ended, in ms of Redis TIME."""
        return self._of("deadlines")

    def counters(self) -> str:
        """Hash: waiting tasks and tokens by stage and lane, totals since the pool began."""
        return self._of("counters")

    def delayed(self) -> str:
        """Sorted set: requests that wait for a retry, or were admitted for later, by the ms at which they may be claimed."""
        return self._of("delayed")

    def orphans(self) -> str:
        """Sorted set: requests without a reader by the ms at which they are cancelled."""
        return self._of("orphans")

    def served(self, api: str) -> str:
        """Set: requests that end when the API process that serves them does."""
        return self._of("served", api)

    def held(self, owner: str) -> str:
        """Set: the requests of an API key that have not ended."""
        return self._of("held", owner)

    def settings(self) -> str:
        """Hash: router settings changed at run time, read by every API replica."""
        return self._of("settings")

    def stages(self) -> str:
        """The stages that have or had a worker or work."""
        return self._of("stages")

    def alive(self, role: str) -> str:
        """Sorted set: processes of a role (prefill, decode, api) by the time their registration ends."""
        return self._of("alive", role)

    def worker(self, name: str) -> str:
        """Hash: what a worker says of itself, and the answer to its last claim."""
        return self._of("worker", name)

    def dead(self) -> str:
        """Stream: dead-lettered tasks with reason and last worker."""
        return self._of("dead")

    def kv_events(self) -> str:
        """Stream: what the prefix caches of the workers got and lost."""
        return self._of("kv")

    def scaler(self) -> str:
        """String: who scales the pool."""
        return self._of("scaler")

    def scaling(self) -> str:
        """Hash: how many workers each stage should have by the last decision, and why."""
        return self._of("scaling")

    def crew(self) -> str:
        """Hash: the workers that whoever scales the pool has started, with their stage."""
        return self._of("crew")

    def bus(self, api: str) -> str:
        """Channel: frames for one API process."""
        return self._of("bus", api)

    def tokens(self, request_id: str) -> str:
        """Channel: frames of one watched request."""
        return self._of("tok", request_id)

    def control(self, worker: str) -> str:
        """Channel: notes to one worker."""
        return self._of("ctl", worker)

    def bell(self, stage: str) -> str:
        """Channel: something waits on a lane of this stage; for `pool`: workers or settings have changed."""
        return self._of("bell", stage)

    def ask(self) -> str:
        """Channel: questions to all workers of the pool."""
        return self._of("ask")

    def told(self, ticket: str) -> str:
        """Channel: the workers' answers to one question."""
        return self._of("told", ticket)

    def events(self) -> str:
        """Channel: what happened to tasks and workers, as it happens."""
        return self._of("events")


def lua_prelude() -> str:
    """Lua functions `key_<name>(...)` that build the same names; `root` is KEYS[1]."""
    lines = ["local root = KEYS[1]", f"local GROUP, PARKED, DELAYED = '{GROUP}', '{PARKED}', '{DELAYED}'"]
    for name, spec in TABLE.items():
        count = spec.template.count("{")
        params = ", ".join("ab"[:count])
        body = spec.template.replace("{0}", "' .. a .. '").replace("{1}", "' .. b .. '")
        lines.append(f"local function key_{name}({params}) return root .. '{body}' end".replace(" .. ''", ""))
    return "\n".join(lines)
