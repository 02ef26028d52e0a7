"""What the routes of OpenAI's clients, of tokens, of requests and of operators answer. Types for the page: answers are written by `shapes/`
and the routes, and what they write is checked against these by the tests."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pipeline.surface.errors import ErrorBody

Natural = Annotated[int, Meta(ge=0)]
Finish = Literal["stop", "length", "tool_calls"]
Tier = Literal["default", "priority", "flex"]


class Said(msgspec.Struct, forbid_unknown_fields=True):
    """An object that says what its type lists and no more; what is unset is left out."""


class ErrorAnswer(Said):
    """An error, also as the last event of a stream."""

    error: ErrorBody


class PromptTokensDetails(Said):
    """`cached_tokens`: of those of the prompt, they were computed before."""

    cached_tokens: Natural


class Usage(Said):
    """Tokens of a request."""

    prompt_tokens: Natural
    completion_tokens: Natural
    total_tokens: Natural
    prompt_tokens_details: PromptTokensDetails


class UsageInStream(Said):
    """With `continuous_usage_stats` those so far, without details; with `include_usage` those of the whole in the end."""

    prompt_tokens: Natural
    completion_tokens: Natural
    total_tokens: Natural
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET


class LikelyToken(Said):
    """A token that could have come."""

    token: str
    logprob: float | None
    bytes: list[Natural]


class TokenLogprob(LikelyToken):
    """A token that came. `logprob` is null where Redis lost it."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(Said):
    """Of the tokens of a message."""

    content: list[TokenLogprob]


class CompletionLogprobs(Said):
    """Of the tokens of a text, in lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[Natural]


class RankedToken(Said):
    """A token of a prompt, or one that could have stood there; `rank` 1 is the likeliest."""

    logprob: float | None
    rank: Natural | None
    decoded_token: str


PromptLogprobs = list[dict[str, RankedToken] | None]  # by token id; null for the first token, and for what Redis lost


class CalledFunctionAnswer(Said):
    """`arguments` is JSON."""

    name: str
    arguments: str


class ToolCallAnswer(Said):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class AssistantMessage(Said):
    """What the model said. Reasoning is under the name that `api.reasoning_field` sets."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallAnswer] | UnsetType = UNSET


class ChatChoice(Said, kw_only=True):
    """One answer."""

    index: Natural
    message: AssistantMessage
    logprobs: ChatLogprobs | UnsetType = UNSET
    finish_reason: Finish


class ChatCompletion(Said, kw_only=True):
    """The answers as a whole."""

    id: str
    object: Literal["chat.completion"]
    created: Natural
    model: str
    service_tier: Tier | UnsetType = UNSET
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class FunctionDelta(Said, kw_only=True):
    """The name comes once, arguments in pieces."""

    name: str | UnsetType = UNSET
    arguments: str


class ToolCallDelta(Said, kw_only=True):
    """`id` and `type` come once."""

    index: Natural
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta


class ChatDelta(Said):
    """What an event adds to a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Said, kw_only=True):
    """Of one choice; `finish_reason` is null until its last event."""

    index: Natural
    delta: ChatDelta
    logprobs: ChatLogprobs | UnsetType = UNSET
    finish_reason: Finish | None


class ChatChunk(Said, kw_only=True):
    """An event of a stream of chat completions; the one with the usage of the whole has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: Natural
    model: str
    service_tier: Tier | UnsetType = UNSET
    choices: list[ChatChunkChoice]
    usage: UsageInStream | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionText(Said, kw_only=True):
    """`token_ids` and `prompt_token_ids` with `return_token_ids`."""

    index: Natural
    text: str
    token_ids: list[Natural] | UnsetType = UNSET
    prompt_token_ids: list[Natural] | UnsetType = UNSET
    logprobs: CompletionLogprobs | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionChoice(CompletionText, kw_only=True):
    """One answer."""

    finish_reason: Finish


class Completion(Said, kw_only=True):
    """The answers as a whole, to each prompt in turn."""

    id: str
    object: Literal["text_completion"]
    created: Natural
    model: str
    service_tier: Tier | UnsetType = UNSET
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(CompletionText, kw_only=True):
    """What an event adds to one choice; `finish_reason` is null until its last event."""

    finish_reason: Finish | None


class CompletionChunk(Said, kw_only=True):
    """An event of a stream of completions; the one with the usage of the whole has no choices."""

    id: str
    object: Literal["text_completion"]
    created: Natural
    model: str
    service_tier: Tier | UnsetType = UNSET
    choices: list[CompletionChunkChoice]
    usage: UsageInStream | UnsetType = UNSET


class Embedding(Said):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: Natural
    embedding: list[float] | str


class EmbeddingUsage(Said):
    """Tokens of all inputs."""

    prompt_tokens: Natural
    total_tokens: Natural


class Embeddings(Said):
    """A vector for each input."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokenized(Said):
    """`token_strs` is null unless it was asked for."""

    count: Natural
    max_model_len: Natural
    tokens: list[Natural]
    token_strs: list[str] | None


class Detokenized(Said):
    """The text of all tokens."""

    prompt: str


class Model(Said):
    """A configured pool, or an adapter of its model."""

    id: str
    object: Literal["model"]
    created: Natural
    owned_by: Literal["baton"]
    max_model_len: Natural
    parent: str | UnsetType = UNSET


class Models(Said):
    """Those that the caller may use."""

    object: Literal["list"]
    data: list[Model]


State = Literal["queued", "running", "done", "failed", "cancelled", "expired", "dead", "gone"]


class RequestTimes(Said):
    """Microseconds of Redis's clock; null where it has not happened."""

    admitted: Natural | None
    claimed_prefill: Natural | None
    handover: Natural | None
    claimed_decode: Natural | None
    fetched: Natural | None
    first_token: Natural | None
    ended: Natural | None


class RequestChoice(Said, kw_only=True):
    """What one choice says so far: a message of chats and messages, a text of completions."""

    index: Natural
    message: AssistantMessage | UnsetType = UNSET
    text: str | UnsetType = UNSET
    token_ids: list[Natural] | UnsetType = UNSET
    prompt_token_ids: list[Natural] | UnsetType = UNSET
    logprobs: dict[str, Any] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    finish_reason: Finish | None


class RequestRecord(Said):
    """Where a request stands."""

    id: str
    object: Literal["request"]
    kind: str
    model: str
    created: Natural
    state: State
    reason: str
    stage: str
    lane: str
    attempts: Natural
    resumable: bool
    timeline: RequestTimes
    usage: Usage
    choices: list[RequestChoice]
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CancelledRequest(Said):
    """State and reason as they stand, also of a request that had ended by itself."""

    id: str
    object: Literal["request"]
    state: State
    reason: str


class Alive(Said):
    """The process runs."""

    status: Literal["ok"]


class Unready(Said):
    """Why no request should be sent here."""

    status: Literal["draining", "redis unavailable"]
    pools: list[str] | UnsetType = UNSET


class PoolHealth(Said):
    """What is wrong with a pool, its live workers by role and its waiting tasks by stage."""

    status: Literal["ok", "degraded", "unavailable"]
    problems: list[str]
    workers: dict[str, Natural]
    waiting: dict[str, Natural]


class Health(Said):
    """Everything that is wrong."""

    status: Literal["ok", "degraded", "unavailable", "draining"]
    version: str
    pools: dict[str, PoolHealth]


class Version(Said):
    """Of Baton."""

    version: str


class ScalingLane(Said):
    """One lane of a stage; null is what nobody knows."""

    waiting: Natural | None
    prompt_tokens: Natural | None
    oldest_s: float | None
    arrivals_per_s: float | None
    prompt_tokens_per_s: float | None


class ScalingStage(Said):
    """A stage: the workers that it should have, why, and what that follows from."""

    desired: Natural
    why: str
    alive: Natural | None
    running: Natural | None
    blocks_used: Natural | None
    blocks_total: Natural | None
    served_per_s: float | None
    predicted_wait_s: float | None
    lanes: dict[str, ScalingLane]


class ScalingSpeeds(Said):
    """What was measured of the pool's engines and answers."""

    prompt_token_s: float | None
    inter_token_s: float | None
    answer_tokens: float | None
    blocks_per_sequence: float | None
    sequences_per_worker: float | None


class Scaling(Said):
    """How many workers a pool should have. `local`: of prompts that decode computes for want of a prefill worker."""

    object: Literal["scaling"]
    pool: str
    time_ms: Natural
    stages: dict[str, ScalingStage]
    local_prompt_tokens: Natural | None
    local_prompt_tokens_per_s: float | None
    speeds: ScalingSpeeds
