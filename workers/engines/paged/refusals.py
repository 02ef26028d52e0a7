"""What no engine of blocks can serve, said before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import Unservable
from pipeline.protocol import BackendInput, Log
from workers.engine import EngineInfo


def refuse_unserved(
    request: BackendInput, done: Log, info: EngineInfo, unserved: Sequence[tuple[str, bool]] | None = None
) -> None:
    """Raise `Unservable` naming the field for what this engine does not serve or could never fit.

    `unserved`: fields that it does not serve, and whether this request asks for them; by default those of `unserved_fields`.
    """
    for field, is_asked in unserved_fields(request) if unserved is None else unserved:
        if is_asked:
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


def unserved_fields(request: BackendInput) -> list[tuple[str, bool]]:
    """Fields that are on the wire but not yet served, and whether this request asks for them."""
    sampling, output = request.sampling_options, request.output_options
    return [
        ("sampling_options.min_p", sampling.min_p != 0),
        ("sampling_options.presence_penalty", sampling.presence_penalty != 0),
        ("sampling_options.frequency_penalty", sampling.frequency_penalty != 0),
        ("sampling_options.repetition_penalty", sampling.repetition_penalty != 1),
        ("sampling_options.logit_bias", bool(sampling.logit_bias)),
        ("sampling_options.guided_decoding", sampling.guided_decoding is not None),
        ("output_options.logprobs", output.logprobs is not None),
        ("output_options.prompt_logprobs", output.prompt_logprobs is not None),
        ("routing.lora_name", request.routing is not None and bool(request.routing.lora_name)),
    ]
