"""What only some engines serve. An API refuses by this what the engine of its pool would refuse, before anything is queued."""

from __future__ import annotations

from pipeline.errors import InvalidRequest

GUIDED_DECODING, LOGPROBS, PROMPT_LOGPROBS, LORA = "guided_decoding", "logprobs", "prompt_logprobs", "lora"
MIN_P, PENALTIES, LOGIT_BIAS = "min_p", "penalties", "logit_bias"
EMBEDDINGS = "embeddings"

SERVED: dict[str, frozenset[str]] = {
    "torch": frozenset({EMBEDDINGS, GUIDED_DECODING, LOGPROBS, PROMPT_LOGPROBS, MIN_P, PENALTIES, LOGIT_BIAS}),
    "vllm": frozenset({GUIDED_DECODING, LOGPROBS, PROMPT_LOGPROBS, MIN_P, PENALTIES, LOGIT_BIAS, LORA}),
}  # by engine; of the others none


def is_served(engine: str, feature: str) -> bool:
    """Whether this engine serves it."""
    return feature in SERVED.get(engine, frozenset())


def refuse_unserved(engine: str, feature: str, param: str) -> None:
    """Raise `InvalidRequest` naming the field of a body that asks for a feature which this engine does not serve."""
    if not is_served(engine, feature):
        raise InvalidRequest(
            f"{param} is not supported: the engine of this model, {engine}, does not serve it",
            param=param,
            code="unsupported_parameter",
        )
