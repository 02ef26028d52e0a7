"""Makes vLLM's engine in this process, and says what it is. Imports vLLM: only the engine's thread gets here."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# before vLLM is imported; what the user has set stays
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduler and model in this process
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else each engine of a machine is pinned to the same cores
    "PYTHONHASHSEED": "0",  # vLLM 0.26 seeds the hashes of its prefix cache with it
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

import msgspec  # noqa: E402
import torch  # noqa: E402
import xxhash  # noqa: E402
from transformers.utils.hub import cached_file  # noqa: E402
from vllm import EngineArgs, SamplingParams  # noqa: E402
from vllm.config import KVEventsConfig, KVTransferConfig  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402

from pipeline.builtin import model_place  # noqa: E402
from pipeline.config import PoolSettings, VllmSettings  # noqa: E402
from pipeline.errors import ConfigError, Unservable  # noqa: E402
from workers.engine import EngineInfo  # noqa: E402
from workers.engines.vllm import connector, sampling  # noqa: E402
from workers.engines.vllm.adapters import Adapter, arguments_for, lora_request  # noqa: E402
from workers.engines.vllm.exchange import Connector  # noqa: E402
from workers.engines.vllm.handover import HandOver  # noqa: E402
from workers.engines.vllm.memory import PagedMemory, fingerprint  # noqa: E402
from workers.engines.weights import add_weights  # noqa: E402

CPU_KV_BYTES = 2**30  # by itself vLLM takes a share of all memory, which two workers of a host cannot both have


def make_engine(pool: PoolSettings, settings: VllmSettings, adapters: Mapping[str, Adapter], exchange: HandOver) -> Any:
    """vLLM's `LLMEngine` over the pool's model, its adapters loaded. Raises `Unservable` with vLLM's own reason."""
    place = Path(model_place(pool.model))
    if place.is_absolute() and not place.is_dir():  # vLLM would take it for the id of a repository
        raise Unservable(f"pools.<name>.model = {pool.model}: there is no such folder")
    engine_id = uuid.uuid4().hex
    connector.exchanges[engine_id] = exchange
    torch.set_num_threads(settings.threads)
    is_compiled = not (settings.enforce_eager and current_platform.is_cpu())
    if not is_compiled:  # vLLM compiles some functions all the same, at their first call; on GPUs kernels are made so
        torch.compiler.set_stance("force_eager")
    try:
        made_of = arguments(pool, settings, adapters, exchange.connector, engine_id)
        engine = LLMEngine.from_engine_args(EngineArgs(**made_of))
        for adapter in adapters.values():  # now: one that cannot be loaded while a step is made would end the engine
            engine.add_lora(lora_request(adapter))
        if is_compiled:
            warm_up(engine)
        return engine
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        raise Unservable(f"vLLM does not start with {pool.model}: {error}") from error


def warm_up(engine: Any) -> None:
    """Let vLLM compile now what log probabilities need: it takes seconds, in which no request of the engine goes on."""
    params = SamplingParams(max_tokens=1, logprobs=1, detokenize=False)
    engine.add_request("warm-up", {"prompt_token_ids": [0]}, params)
    while engine.has_unfinished_requests():
        engine.step()


def arguments(
    pool: PoolSettings, settings: VllmSettings, adapters: Mapping[str, Adapter], kind: Connector, engine_id: str
) -> dict[str, Any]:
    """vLLM's engine arguments: ours, and over them those of `engine.vllm.args`."""
    transfer = KVTransferConfig(
        kv_connector=kind.name,
        kv_connector_module_path=kind.module,
        kv_connector_extra_config=kind.config,
        kv_role="kv_both",
        engine_id=engine_id,
    )
    ours: dict[str, Any] = {
        "model": model_place(pool.model),
        "tokenizer": model_place(pool.tokenizer_source if pool.has_tokenizer else pool.model),
        "skip_tokenizer_init": not pool.has_tokenizer
        or not has_tokenizer(pool.tokenizer_source),  # without one only grammars are missing
        "generation_config": "vllm",
        "dtype": settings.dtype,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enable_prefix_caching": settings.prefix_cache,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enforce_eager": settings.enforce_eager,
        "kv_transfer_config": transfer,
        "scheduling_policy": "priority",
        "logits_processors": [f"{sampling.__name__}:{sampling.KeyedSampling.__name__}"],
        "disable_log_stats": False,
    }
    optional = {
        "block_size": settings.block_size,
        "max_model_len": pool.max_model_len,
        "kv_cache_memory_bytes": settings.kv_cache_bytes or (CPU_KV_BYTES if current_platform.is_cpu() else 0),
        "kv_events_config": settings.kv_events and KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    }
    given = {name: value for name, value in optional.items() if value}
    return ours | given | arguments_for(adapters, on_cpu=current_platform.is_cpu()) | more_arguments(settings.args)


def has_tokenizer(name: str) -> bool:
    """Whether a model comes with a tokenizer."""
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    try:
        return any(
            cached_file(model_place(name), file, _raise_exceptions_for_missing_entries=False) is not None
            for file in files
        )
    except OSError:
        return False


def more_arguments(text: str) -> dict[str, Any]:
    """The engine arguments of `engine.vllm.args`. Raises `ConfigError`."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any]) if text else {}
    except msgspec.DecodeError as error:
        raise ConfigError(f"engine.vllm.args: not a JSON object: {error}") from error


def device() -> int | None:
    """The GPU that vLLM will compute on: the first one that this process sees."""
    return 0 if torch.cuda.is_available() else None


def describe(engine: Any, memory: PagedMemory, model: str) -> EngineInfo:
    """What the engine is, once it has started."""
    config = engine.vllm_config
    [weights] = engine.engine_core.collective_rpc(sample_weights)
    num_blocks = memory.num_blocks - 1  # vLLM keeps the first one empty
    block_size = config.cache_config.block_size
    return EngineInfo(
        name="vllm",
        model=model,
        layout=fingerprint(memory, block_size, weights),
        block_size=block_size,
        num_blocks=num_blocks,
        block_nbytes=memory.block_nbytes,
        max_model_len=min(config.model_config.max_model_len, num_blocks * block_size),
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
    )


def sample_weights(worker: Any) -> str:
    """A digest of the model's weights: shapes, types, a sample of each."""
    digest = xxhash.xxh3_128()
    weights = {name.replace(".base_layer.", "."): weight for name, weight in worker.get_model().state_dict().items()}
    add_weights(digest, sorted(weights.items()))  # with room for adapters the same weights have longer names
    return digest.hexdigest()
