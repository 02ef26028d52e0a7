"""Embeddings as tasks: vectors of token sequences, made by the workers of Baton's own stage `embed`.

One request of a client becomes one or several tasks, each with consecutive inputs: a task's result has to fit `queue.max_result_bytes`,
and several workers may share a large request. A task's prompt is its inputs one after the other, so that queued tokens, limits and usage
count them as they count those of generations; their lengths and the dimensions that are asked for are the arguments of its call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec

from pipeline.config import PoolSettings, QueueSettings
from pipeline.errors import RequestFailed, WireError
from pipeline.protocol import Request, TaskCall, no_input
from pipeline.queue import EMBED

KIND = "embedding"

MOST_INPUTS = 2048  # of one request, as OpenAI has it
PART_TOKENS = 8192  # of a task, unless a single input has more
WIDEST = 16_384  # numbers of a vector where the model does not say how many it has
HEAD_BYTES = 16  # of a result, around its numbers


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """What a pool that makes embeddings gives. `width`: numbers of a vector; None: not known here."""

    width: int | None
    is_matryoshka: bool  # whether the first numbers of a vector are a vector, too
    part_inputs: int  # of a task, at most


def offer_of(pool: PoolSettings, queue: QueueSettings, width: int | None) -> Offer | None:
    """What a pool offers; None where it makes no embeddings."""
    if not pool.embeddings:
        return None
    part_inputs = max(1, (queue.max_result_bytes - HEAD_BYTES) // (4 * (width or WIDEST)))
    return Offer(width, pool.matryoshka, min(part_inputs, MOST_INPUTS))


def parts_of(lengths: Sequence[int], most_inputs: int) -> list[range]:
    """Which inputs of these lengths go into one task: consecutive ones, at most `most_inputs` and `PART_TOKENS`."""
    parts: list[range] = []
    start = tokens = 0
    for position, length in enumerate(lengths):
        if position > start and (position - start == most_inputs or tokens + length > PART_TOKENS):
            parts.append(range(start, position))
            start, tokens = position, 0
        tokens += length
    return [*parts, range(start, len(lengths))]


def embedding_request(
    request_id: str, pool: str, sequences: Sequence[list[int]], dimensions: int | None, *, created_s: int, owner: str = "",
    resumable: bool = False,
) -> Request:  # fmt: skip
    """The request of one task."""
    flat = [token for tokens in sequences for token in tokens]
    kwargs = {} if dimensions is None else {"dimensions": dimensions}
    return Request(
        id=request_id,
        kind=KIND,
        created_s=created_s,
        input=msgspec.structs.replace(no_input(request_id, pool), token_ids=flat),
        resumable=resumable,
        owner=owner,
        task=TaskCall(name=EMBED, args=[[len(tokens) for tokens in sequences]], kwargs=kwargs),
    )


class Asked(msgspec.Struct, frozen=True):
    """What a worker is asked for."""

    sequences: list[list[int]]
    dimensions: int | None


def asked_of(request: Request) -> Asked:
    """What `embedding_request` put in. Raises `WireError` for what cannot come from it."""
    call = request.task
    assert call is not None
    try:
        (lengths,) = msgspec.convert(call.args, tuple[list[int]])
        dimensions = msgspec.convert(call.kwargs.get("dimensions"), int | None)
    except msgspec.ValidationError as error:
        raise WireError(f"{request.id}: arguments of {EMBED} are not lengths and dimensions: {error}") from error
    token_ids = request.input.token_ids
    if min(lengths, default=0) < 1 or sum(lengths) != len(token_ids) or (dimensions is not None and dimensions < 1):
        raise WireError(
            f"{request.id}: {len(lengths)} inputs of {sum(lengths)} tokens, and a prompt of {len(token_ids)}; "
            f"dimensions {dimensions}"
        )
    sequences, start = [], 0
    for length in lengths:
        sequences.append(token_ids[start : start + length])
        start += length
    return Asked(sequences, dimensions)


def vectors_of(request_id: str, result: bytes, count: int) -> list[bytes]:
    """The `count` vectors in the result of a task, each little-endian float32. Raises `RequestFailed` where there are not as many."""
    data = msgspec.msgpack.decode(result) if result else b""
    if not isinstance(data, bytes) or not data or len(data) % (4 * count):
        raise RequestFailed(f"{request_id}: its result is not {count} vectors: send the request again")
    size = len(data) // count
    return [data[start : start + size] for start in range(0, len(data), size)]
