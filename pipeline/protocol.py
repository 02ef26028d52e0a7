"""What crosses a process border: tagged, versioned msgspec structs. Unknown tags and fields are refused with their path.

A new meaning is a new tag; a struct whose tag ends in a version above `WIRE_VERSION` belongs to a newer worker and is left to it.
Token logs are not structs: they are packed little-endian unsigned 32-bit token ids (`pack_tokens`, `unpack_tokens`).
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

WIRE_VERSION = 1
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # all that decoding foreign bytes raises


class Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of every struct that crosses a process border as a map."""


class FinishReason(enum.StrEnum):
    """Why a choice ended, in the engine's words; `api` maps eos and stop to OpenAI's `stop`."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class StopConditions(Wire, frozen=True, kw_only=True):
    """When a choice ends. `max_tokens` is resolved by the Preprocessor and is never None once admitted."""

    max_tokens: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False


class GuidedDecoding(Wire, frozen=True, kw_only=True):
    """A constraint on the output; exactly one field is set."""

    json: str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class SamplingOptions(Wire, frozen=True, kw_only=True):
    """How the next token is chosen. `temperature` 0 is greedy. `seed` None draws from the operating system's entropy."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] | None = None
    include_stop_str_in_output: bool = False
    guided_decoding: GuidedDecoding | None = None


class OutputOptions(Wire, frozen=True, kw_only=True):
    """What is returned beside the tokens."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True


class RoutingHints(Wire, frozen=True, kw_only=True):
    """Values for the routers and engines that are not sampling."""

    lora_name: str | None = None
    cache_salt: str | None = None
    priority: int = 0  # inside the engine, lower goes first; a worker sets it from the lane, so it is stored nowhere


class BackendInput(Wire, frozen=True, kw_only=True, tag="backend_input.v1", tag_field="type"):
    """The engine's input: token ids in, nothing of text or HTTP."""

    request_id: str
    model: str
    token_ids: list[int]
    stop_conditions: StopConditions
    sampling_options: SamplingOptions
    output_options: OutputOptions = OutputOptions()
    eos_token_ids: list[int] = []
    routing: RoutingHints | None = None
    annotations: list[str] = []


class TaskCall(Wire, frozen=True, kw_only=True):
    """A call of a task of one's own: its name and its arguments, as msgpack carries them."""

    name: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class Request(Wire, frozen=True, kw_only=True, tag="request.v1", tag_field="type"):
    """What a client asked for, stored once at admission. `kind` says which answer shape a reader gives it.

    `task`: set where it is for a stage of one's own. Its `input` is then `no_input`: there is nothing for an engine in it.
    """

    id: str
    kind: str  # "chat.completion" | "text_completion" | "response" | "task"
    created_s: int
    input: BackendInput
    include_usage: bool = False
    resumable: bool = False
    owner: str = ""  # id of the API key that created it; reading and cancelling need the same
    task: TaskCall | None = None


def no_input(request_id: str, pool: str) -> BackendInput:
    """The input of a request that no engine will see: no prompt, and one choice whose log takes what its task emits."""
    return BackendInput(
        request_id=request_id, model=pool, token_ids=[], stop_conditions=StopConditions(), sampling_options=SamplingOptions()
    )  # fmt: skip


class KVHandle(Wire, frozen=True, kw_only=True, tag="kv_handle.v1", tag_field="type"):
    """Where the blocks of a request are and who owns them. `params` belongs to the transfer (or engine) and is carried unread."""

    id: str
    request_id: str
    owner: str  # worker name
    transfer: str  # "shm", "tcp", ...
    layout: (
        str  # fingerprint of model weights' shape, dtype, block size and block order; equal on both sides or refused
    )
    num_tokens: int  # tokens whose keys and values the blocks hold
    num_blocks: int
    nbytes: int
    cached_tokens: int = 0  # prompt tokens that the prefill side did not compute
    digest: str | None = None  # xxh3-128 of the bytes, when verification is on
    params: dict[str, Any] = {}


class Log(Wire, frozen=True, kw_only=True):
    """Tokens so far by choice, and why those choices that have ended did."""

    tokens: list[list[int]]
    finished: list[FinishReason | None]

    @classmethod
    def empty(cls, n: int) -> Log:
        """A log of `n` choices with nothing in it."""
        return cls(tokens=[[] for _ in range(n)], finished=[None] * n)


class LLMEngineOutput(msgspec.Struct, frozen=True, array_like=True):
    """One step's output for one choice: `token_ids` stand at `index`, `index + 1`, ... of that choice's log."""

    request_id: str
    choice: int
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    log_probs: list[float] | None = None
    error: str | None = None  # with FinishReason.ERROR: what happened
    top_logprobs: list[list[tuple[int, float]]] | None = None  # of each token: the likeliest at its place, best first
    prompt_logprobs: bytes = b""  # records of the whole prompt, where asked for, with one output of who computed it


class TokenItem(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    """Live tokens on the bus: `tokens` are packed ids that stand at `index` of the choice's log."""

    id: str
    choice: int
    index: int
    tokens: bytes
    finish_reason: str = ""
    logprobs: bytes = b""  # records of these tokens (`pipeline/logprobs.py`), where they were asked for


class Timeline(msgspec.Struct, frozen=True, array_like=True):
    """When each step of a request's life happened, in microseconds of Redis TIME; 0 where it did not happen."""

    admitted: int = 0
    claimed_prefill: int = 0
    handover: int = 0
    claimed_decode: int = 0
    fetched: int = 0
    first_token: int = 0
    ended: int = 0


class EndItem(msgspec.Struct, frozen=True, array_like=True, tag="e"):
    """The end of a request on the bus. Written by the end script: state is one of the ended states."""

    id: str
    state: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    stage: str
    timeline: Timeline


FrameItem = TokenItem | EndItem
Frame = list[FrameItem]  # what one PUBLISH carries


class CancelNote(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """To a worker: the request ended elsewhere; stop it and free its blocks."""

    id: str
    epoch: int


class FreeNote(msgspec.Struct, frozen=True, array_like=True, tag="free"):
    """To the owner of a handle: nobody needs it any more."""

    handle_id: str


class BellNote(msgspec.Struct, frozen=True, array_like=True, tag="bell"):
    """To the workers of a stage: look at the lanes."""

    stage: str


Note = CancelNote | FreeNote | BellNote


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as the token log stores them: unsigned 32 bit, little-endian."""
    return array("I", token_ids).tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """The reverse of `pack_tokens`; a torn tail of fewer than 4 bytes is left out."""
    packed = array("I")
    packed.frombytes(data[: len(data) // 4 * 4])
    return packed.tolist()
