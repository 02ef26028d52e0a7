"""What no engine of blocks can serve, said before anything is computed."""

from __future__ import annotations

from pipeline.errors import KVLost, Unservable
from pipeline.features import (
    GUIDED_DECODING,
    LOGIT_BIAS,
    LOGPROBS,
    LORA,
    MIN_P,
    PENALTIES,
    PROMPT_LOGPROBS,
    is_served,
)
from pipeline.protocol import BackendInput, KVHandle, Log
from workers.engine import EngineInfo
from workers.engines.paged.shaping import bias_of


def refuse_unserved(request: BackendInput, done: Log, info: EngineInfo) -> None:
    """Raise `Unservable` naming the field for what this engine does not serve or could never fit."""
    for field, feature in asked_fields(request):
        if not is_served(info.name, feature):
            raise Unservable(f"request {request.request_id}: the {info.name} engine does not serve {field}")
    n = request.sampling_options.n
    if len(done.tokens) != n or len(done.finished) != n:
        raise Unservable(f"request {request.request_id}: a log of {len(done.tokens)} choices for n = {n}")
    if not 1 <= n <= info.max_num_seqs:
        raise Unservable(f"request {request.request_id}: n = {n}, at most {info.max_num_seqs} choices run at once")
    if not request.token_ids:
        raise Unservable(f"request {request.request_id}: the prompt is empty")
    if len(request.token_ids) >= info.max_model_len:
        raise Unservable(
            f"request {request.request_id}: a prompt of {len(request.token_ids)} tokens leaves no room for an answer "
            f"in {info.max_model_len} (of the model, or of {info.num_blocks} blocks of {info.block_size})"
        )


def refuse_foreign(request: BackendInput, kv: KVHandle, info: EngineInfo) -> None:
    """Raise `KVLost` for a handle of another layout, or of other blocks than this request's prompt has."""
    if kv.layout != info.layout:
        raise KVLost(f"handle {kv.id}: layout {kv.layout}, this engine has {info.layout}", reason="layout")
    blocks = -(-kv.num_tokens // info.block_size)
    if not 0 < kv.num_tokens <= len(request.token_ids) or kv.num_blocks != blocks:
        raise KVLost(
            f"handle {kv.id}: {kv.num_tokens} tokens in {kv.num_blocks} blocks for a prompt of "
            f"{len(request.token_ids)} tokens",
            reason="layout",
        )


def asked_fields(request: BackendInput) -> list[tuple[str, str]]:
    """The fields by which this request asks for what only some engines serve, and the feature that each stands for."""
    sampling, output = request.sampling_options, request.output_options
    asked = [
        ("sampling_options.min_p", MIN_P, sampling.min_p != 0),
        ("sampling_options.presence_penalty", PENALTIES, sampling.presence_penalty != 0),
        ("sampling_options.frequency_penalty", PENALTIES, sampling.frequency_penalty != 0),
        ("sampling_options.repetition_penalty", PENALTIES, sampling.repetition_penalty != 1),
        ("sampling_options.logit_bias", LOGIT_BIAS, bool(sampling.logit_bias)),
        ("sampling_options.guided_decoding", GUIDED_DECODING, sampling.guided_decoding is not None),
        ("output_options.logprobs", LOGPROBS, output.logprobs is not None),
        ("output_options.prompt_logprobs", PROMPT_LOGPROBS, output.prompt_logprobs is not None),
        ("routing.lora_name", LORA, request.routing is not None and bool(request.routing.lora_name)),
    ]
    return [(field, feature) for field, feature, is_asked in asked if is_asked]


def refuse_foreign_tokens(request: BackendInput, vocab_size: int) -> None:
    """Raise `Unservable` for a bias of tokens that the model does not have."""
    for token in bias_of(request):
        if not 0 <= token < vocab_size:
            raise Unservable(
                f"request {request.request_id}: logit_bias: token id {token}, the model has {vocab_size} tokens"
            )
