"""From Baton's requests to vLLM's: one of vLLM's for each choice that has not ended."""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.protocol import BackendInput
from workers.engines.paged.shaping import bias_of
from workers.engines.vllm.grammars import constraint_of
from workers.engines.vllm.keyed import KEY, Keyed, is_keyed, needs_processor


def prompt_of(request: BackendInput, done: list[int]) -> dict[str, Any]:
    """What vLLM takes for the prompt: the tokens of a resumed choice so far are part of it."""
    salt = request.routing.cache_salt if request.routing else None
    prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": [*request.token_ids, *done]}
    return prompt | ({"cache_salt": salt} if salt else {})


def priority_of(request: BackendInput) -> int:
    """vLLM's priority: of those that wait the lowest begins, and when blocks run out the highest is preempted."""
    return request.routing.priority if request.routing else 0


def params_of(
    request: BackendInput,
    choice: int,
    done: list[int],
    *,
    max_tokens: int,
    vocab_size: int,
    scores_prompt: bool = False,
) -> Any:
    """vLLM's `SamplingParams` for what is left of a choice whose log holds `done`; at most `max_tokens` more. `scores_prompt`: it is the
    one that computes the prompt, all of it, and tells what the request asks of it."""
    from vllm import SamplingParams

    sampling, stop = request.sampling_options, request.stop_conditions
    ours = needs_processor(sampling)
    goes_on = stop.ignore_eos and sampling.guided_decoding is None  # behind a grammar nothing may follow
    eos = () if goes_on else (token for token in request.eos_token_ids if token < vocab_size)  # it dies of others
    keyed = Keyed(options=sampling, choice=choice, done=done)
    return SamplingParams(
        temperature=0.0 if is_keyed(sampling) else sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=1.0 if ours else sampling.repetition_penalty,  # vLLM's comes when ours has chosen
        logit_bias=bias_of(request) or None,
        max_tokens=max_tokens,
        min_tokens=min(max_tokens, max(0, (stop.min_tokens or 0) - len(done))),  # it refuses more than may come
        ignore_eos=True,  # Baton says which tokens end: the request has them
        stop_token_ids=sorted({*(stop.stop_token_ids or ()), *eos}),
        detokenize=False,
        structured_outputs=constraint_of(request),
        logprobs=request.output_options.logprobs,
        prompt_logprobs=request.output_options.prompt_logprobs if scores_prompt else None,
        extra_args={KEY: msgspec.to_builtins(keyed)} if ours else None,
    )
