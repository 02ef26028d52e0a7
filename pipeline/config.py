"""The sections of `config.toml`, one frozen struct each. A part of Baton receives its own section, never `Settings`.

Defaults live here once; `config.toml` repeats every key with its default and a comment, and a test compares the two.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pipeline.api_keys import AuthMode

Count = Annotated[int, Meta(ge=1)]
Amount = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(gt=0, le=1)]

NO_TOKENIZER = "none"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections."""


class RedisSettings(Section, frozen=True, kw_only=True):
    """`[redis]`"""

    url: str = ""  # empty: a private server is started by `baton up`
    run_dir: str = "run"  # where the private server keeps its socket and files
    appendfsync: Literal["everysec", "always"] = "everysec"
    timeout_s: Positive = 5.0  # longest wait for one answer
    connect_s: NotNegative = 30.0  # how long a worker or API that starts asks a Redis that does not answer


class PoolSettings(Section, frozen=True, kw_only=True):
    """`[pools.<name>]`: one served model. The name is the model's id in the API."""

    model: str = "baton-tiny"  # the built-in model, a folder, or a hub id
    engine: Literal["torch", "vllm", "mock"] = "torch"
    tokenizer: str = ""  # empty: the model's own; "none": token ids in, token ids out
    max_model_len: Amount = 0  # 0: what the model says
    response_template: str = (
        ""  # how answers are read: empty for the model's own, "none", a name of Baton's, or a JSON file
    )
    embeddings: bool = False  # /v1/embeddings, by embed workers
    pooling: Literal["auto", "last", "mean", "cls"] = "auto"  # auto: what the model's own files say, else last
    matryoshka: bool = False  # whether its vectors may be cut to the `dimensions` of a request
    loras: str = ""  # NAME=FOLDER NAME2=FOLDER2: adapters of the model, each a model of its own in the API

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is text at all."""
        return self.tokenizer != NO_TOKENIZER

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer comes from, if there is one."""
        return self.tokenizer or self.model


class ApiSettings(Section, frozen=True, kw_only=True):
    """`[api]`"""

    host: str = "127.0.0.1"
    port: Port = 8000
    body_limit_bytes: Count = 4_194_304
    body_timeout_s: Positive = 60.0
    headers_after_s: NotNegative = 5.0
    ping_s: Positive = 15.0
    send_timeout_s: Positive = 30.0
    shutdown_grace_s: NotNegative = 20.0
    default_max_tokens: Count = 512
    max_prompt_logprobs: Count = 262_144  # entries of an answer that tells log probabilities of its prompt
    stream_buffer_items: Count = 4096  # live items kept for one slow reader before it is sent to the token log
    silence_s: Positive = 2.0  # a stream without a frame for this long reads state and log
    reasoning_field: Annotated[str, Meta(pattern="^[a-z_]+$")] = "reasoning_content"  # in chat messages and deltas
    auth: AuthMode = "auto"  # auto: an API key is needed as soon as there is one, and where other machines reach `host`
    keys_file: str = ""  # TOML, one table a key: those that must not be lost with Redis
    keys_refresh_s: Positive = 2.0  # a new, changed or revoked key is known everywhere after this long
    metrics_need_key: bool = True  # whether /metrics does, where requests do
    cors_origins: str = ""  # web pages that browsers may call the API from; "*": all


class RouterSettings(Section, frozen=True, kw_only=True):
    """`[router]`: initial values; changed at run time with `baton config set-router`."""

    max_local_prefill_length: Amount = 0
    max_prefill_queue_size: Amount = 1_000_000


class LaneSettings(Section, frozen=True, kw_only=True):
    """`[queue.high]`, `[queue.default]`, `[queue.low]`: what differs in one lane; 0 means as in `[queue]`."""

    max_waiting_tasks: Amount = 0
    max_waiting_tokens: Amount = 0
    deadline_s: NotNegative = 0.0
    prefill_share: Share = 1.0  # of a prefill worker's room for handles that tasks of this lane may fill
    step_share: Share = (
        1.0  # of a prefill step's tokens to which tasks of this lane fill it while those of higher lanes come
    )


class QueueSettings(Section, frozen=True, kw_only=True):
    """`[queue]`: admission and life of requests."""

    max_waiting_tasks: Amount = 100_000  # a lane
    max_waiting_tokens: Amount = 100_000_000  # queued prompt tokens a lane
    deadline_s: Positive = 600.0
    result_ttl_s: Positive = 600.0  # how long an ended request can be read, a response retrieved
    max_result_bytes: Count = 1_048_576  # a larger result of a task of one's own fails it
    dead_ttl_s: Positive = 86_400.0  # how long a dead-lettered request can be shown and replayed
    overtake_ms: Amount = 2000  # longest that a task which does not fit is passed over
    guard_ms: Amount = 10_000  # what has waited so long on a lower lane gets each eighth claim
    high: LaneSettings = LaneSettings()
    default: LaneSettings = LaneSettings(prefill_share=0.9)
    low: LaneSettings = LaneSettings(prefill_share=0.5, step_share=0.02)

    def lane(self, name: str) -> LaneSettings:
        """What holds for a lane, nothing left open. A worker's own lane is as good as the highest."""
        own: LaneSettings = {"default": self.default, "low": self.low}.get(name, self.high)
        return LaneSettings(
            max_waiting_tasks=own.max_waiting_tasks or self.max_waiting_tasks,
            max_waiting_tokens=own.max_waiting_tokens or self.max_waiting_tokens,
            deadline_s=own.deadline_s or self.deadline_s,
            prefill_share=own.prefill_share,
            step_share=own.step_share,
        )


class WorkerSettings(Section, frozen=True, kw_only=True):
    """`[worker]`"""

    lease_s: Positive = 30.0
    sweep_s: Positive = 0.5
    drain_s: NotNegative = 60.0
    stall_s: Positive = 60.0  # an engine whose step counter stands still this long while it has work is replaced
    max_attempts: Count = 3  # deliveries without progress before a task is dead-lettered
    retry_backoff_s: NotNegative = (
        0.5  # wait before the first retry of a task that failed; doubled each time, with jitter
    )
    retry_backoff_max_s: NotNegative = 10.0
    concurrency: Count = 4  # tasks of one's own that a worker runs at once
    beat_dir: str = ""  # a folder in which a worker shows that it lives and takes tasks; empty: nowhere


class TorchSettings(Section, frozen=True, kw_only=True):
    """`[engine.torch]`"""

    device: str = "auto"  # auto, cpu, cuda, cuda:1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on CPU, the model's on CUDA
    block_size: Count = 16
    num_blocks: Count = 1024
    max_num_seqs: Count = 64
    max_num_batched_tokens: Count = 512
    prefix_cache: bool = True
    threads: Count = 1  # CPU threads of the engine


class VllmSettings(Section, frozen=True, kw_only=True):
    """`[engine.vllm]`; 0 leaves a value to vLLM."""

    dtype: str = "auto"
    block_size: Amount = 0
    kv_cache_bytes: Amount = 0  # memory of the blocks; 0: what `gpu_memory_utilization` leaves, on CPUs 1 GiB
    gpu_memory_utilization: Share = 0.9
    max_num_seqs: Count = 128
    max_num_batched_tokens: Count = 2048
    prefix_cache: bool = True
    enforce_eager: bool = False
    threads: Count = 1  # CPU threads of the engine
    connector: Literal["baton", "nixl"] = "baton"  # how blocks are handed over; nixl: vLLM's own NixlConnector
    kv_events: bool = False  # tell the pool what the prefix cache holds
    args: str = ""  # more of vLLM's engine arguments, a JSON object; they win


class MockSettings(Section, frozen=True, kw_only=True):
    """`[engine.mock]`: time = base + per-token terms, in milliseconds; all zero is an instant engine."""

    block_size: Count = 16
    num_blocks: Count = 4096
    block_nbytes: Count = 4096
    max_num_seqs: Count = 256
    max_num_batched_tokens: Count = 8192
    max_model_len: Count = 32768
    prefix_cache: bool = True
    vocab_size: Count = 2048
    prefill_base_ms: NotNegative = 5.0
    prefill_token_ms: NotNegative = 0.02
    decode_base_ms: NotNegative = 5.0
    decode_seq_ms: NotNegative = 0.05
    kill_token: Annotated[int, Meta(ge=-1)] = -1  # a prompt with it kills the engine's process; -1: none


class EngineSettings(Section, frozen=True, kw_only=True):
    """`[engine]`"""

    torch: TorchSettings = TorchSettings()
    vllm: VllmSettings = VllmSettings()
    mock: MockSettings = MockSettings()

    def of(self, engine: str) -> TorchSettings | VllmSettings | MockSettings:
        """The section of an engine, by its name in `pools.<name>.engine`."""
        section: TorchSettings | VllmSettings | MockSettings = getattr(self, engine)
        return section


class TcpSettings(Section, frozen=True, kw_only=True):
    """`[transfer.tcp]`"""

    host: str = ""  # empty: 127.0.0.1 where Redis is on this host, else the address from which Redis is reached
    port: Port = 0  # 0: any free one
    advertise: str = ""  # empty: host
    streams: Annotated[int, Meta(ge=1, le=64)] = 2
    timeout_s: Positive = 5.0  # longest wait for the other side to go on
    staging_bytes: Count = 268_435_456  # memory for blocks that arrive; more wait in turn


class NixlSettings(Section, frozen=True, kw_only=True):
    """`[transfer.nixl]`"""

    backend: str = "UCX"  # NIXL's plugin
    timeout_s: Positive = 10.0  # longest wait for the other side to go on
    staging_bytes: Count = 268_435_456  # memory for blocks that arrive; more wait in turn


class TransferSettings(Section, frozen=True, kw_only=True):
    """`[transfer]`"""

    kind: Literal["auto", "cuda_ipc", "shm", "nixl", "tcp"] = "auto"
    arena_bytes: Count = 268_435_456  # shared memory of one prefill worker
    cuda_arena_bytes: Annotated[int, Meta(ge=0)] = 0  # memory of its GPU for the same; 0: as arena_bytes
    slab_bytes: Count = 65_536
    dir: str = "/dev/shm"
    verify: bool = False  # content digest in each handle
    tcp: TcpSettings = TcpSettings()
    nixl: NixlSettings = NixlSettings()


class FilesSettings(Section, frozen=True, kw_only=True):
    """`[files]`"""

    url: str = "run/files"  # a folder, or what fsspec reaches: s3://bucket/prefix
    storage_options: str = ""  # what fsspec is told beside the url, a JSON object
    max_bytes: Count = 536_870_912
    max_uploads: Count = 32  # at once, in one API process
    purposes: str = "batch"  # that uploads may have
    expires_after_s: Amount = 2_592_000  # files that do not say; 0: never
    upload_s: Positive = 1800.0  # longest an upload may take
    timeout_s: Positive = 60.0  # longest wait for one answer of the store
    sweep_s: Positive = 300.0


class RqSettings(Section, frozen=True, kw_only=True):
    """`[rq]`: the queue of batches, whose lines are requests like all others"""

    url: str = ""  # empty: redis.url
    queue: str = "baton-batches"


class BatchesSettings(Section, frozen=True, kw_only=True):
    """`[batches]`"""

    max_lines: Count = 50_000
    max_bytes: Count = 209_715_200
    max_line_bytes: Count = 4_194_304
    keep_s: Positive = 2_592_000.0  # how long a batch is known after its end
    lease_s: Positive = 15.0  # a batch whose worker says nothing for so long is taken up by another one
    max_in_flight: Count = 1024  # requests of one batch that wait and run
    part_lines: Annotated[int, Meta(ge=1, le=1000)] = 1000
    part_s: Positive = 20.0  # what has been answered is kept after so long, also where there are fewer
    live_share: Annotated[float, Meta(ge=0, lt=1)] = (
        0.1  # of the decode workers' slots that stays free for live traffic
    )
    webhook_url: str = ""  # who is told of the end of each batch
    webhook_secret: str = ""  # what is told is signed with: whsec_ and base64


class StageScaling(Section, frozen=True, kw_only=True):
    """`[autoscale.prefill]`, `[autoscale.decode]`"""

    min_workers: Amount = 0
    max_workers: Amount = 8
    gpus: Amount = 1  # of one worker, for gpu_budget


class AutoscaleSettings(Section, frozen=True, kw_only=True):
    """`[autoscale]`: what is promised, and how workers follow demand. Each pool has as much."""

    poll_s: Positive = 1.0  # KEDA: pollingInterval
    ttft_s: Positive = 2.0  # promised: time to first token
    itl_ms: Positive = 50.0  # promised: time between two tokens of an answer
    utilization: Share = 0.85  # of the workers, at most, where the promises would allow more
    up_after: Count = 2  # looks in a row that ask for more
    down_after_s: NotNegative = 300.0  # HPA: stabilizationWindowSeconds
    cooldown_s: NotNegative = 60.0  # between changes in opposite directions
    idle_s: NotNegative = 300.0  # KEDA: cooldownPeriod, after which there are none
    gpu_budget: Amount = 0  # of both stages; 0: as many as max_workers takes
    start_s: Positive = 60.0  # start-up of a worker, until one was measured
    start_limit_s: Positive = 1800.0  # one that does not serve by then is killed, and started again
    stale_s: Positive = 15.0  # older signals hold
    devices: str = ""  # the GPUs of this machine that workers may have; empty: they are not dealt out
    log_dir: str = ""  # where workers' lines go; empty: the terminal
    prefill: StageScaling = StageScaling()
    decode: StageScaling = StageScaling()

    @property
    def device_names(self) -> list[str]:
        """The names in `devices`."""
        return self.devices.replace(",", " ").split()

    def stage(self, name: str) -> StageScaling:
        """The bounds of a stage by its name."""
        return self.prefill if name == "prefill" else self.decode


class LogSettings(Section, frozen=True, kw_only=True):
    """`[log]`"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


class Settings(Section, frozen=True, kw_only=True):
    """The whole of `config.toml`; only `main` functions hold it."""

    redis: RedisSettings = RedisSettings()
    pools: dict[str, PoolSettings] = msgspec.field(default_factory=lambda: {"baton-tiny": PoolSettings()})
    api: ApiSettings = ApiSettings()
    router: RouterSettings = RouterSettings()
    queue: QueueSettings = QueueSettings()
    worker: WorkerSettings = WorkerSettings()
    engine: EngineSettings = EngineSettings()
    transfer: TransferSettings = TransferSettings()
    files: FilesSettings = FilesSettings()
    batches: BatchesSettings = BatchesSettings()
    rq: RqSettings = RqSettings()
    autoscale: AutoscaleSettings = AutoscaleSettings()
    log: LogSettings = LogSettings()
