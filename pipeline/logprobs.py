"""Log probabilities from an engine to a reader: packed beside the tokens, as durable as they are, unread until somebody shows them.

Each token has one record of a size that the request fixes, so a record stands in the log where its token's index says:

    record = 1 where it is known, 0 where Redis lost it (u8) | the token's (f32) | of each of the k likeliest: token id (u32), its (f32)

A prompt's tokens, where they are asked for, have records of their own in one string for all choices, from the second token on (nothing
stands before the first). They say the token's rank, too:

    record = known (u8) | the token's (f32) | how many tokens are at least as likely (u32) | of each of the k likeliest: as above
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from typing import NamedTuple

from pipeline.protocol import BackendInput, LLMEngineOutput

MOST = 20  # likeliest tokens that may be asked for: what vLLM gives unless it is told otherwise


class TokenLogprob(NamedTuple):
    """The log probability of one token, and the likeliest tokens at its place, best first."""

    logprob: float
    top: list[tuple[int, float]]


class PromptLogprob(NamedTuple):
    """The log probability of a prompt's token and its rank (1: none is likelier), and the likeliest at its place, best first."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


def record_bytes(request: BackendInput) -> int:
    """Size of the record of a token of this request; 0 where none are asked for."""
    asked = request.output_options.logprobs
    return 0 if asked is None else _record(asked).size


def pack_logprobs(output: LLMEngineOutput) -> bytes:
    """The records of an output's tokens; empty where the engine gave none."""
    if output.log_probs is None:
        return b""
    tops = output.top_logprobs or [[] for _ in output.log_probs]
    return b"".join(
        _record(len(top)).pack(1, logprob, *(value for pair in top for value in pair))
        for logprob, top in zip(output.log_probs, tops, strict=True)
    )


def unpack_logprobs(data: bytes, size: int) -> list[TokenLogprob | None]:
    """What records of `size` bytes say; None for a token whose record was lost."""
    record = _record((size - _record(0).size) // 8)
    return [
        TokenLogprob(logprob, list(zip(top[0::2], top[1::2], strict=True))) if is_known else None
        for is_known, logprob, *top in record.iter_unpack(data)
    ]


def records_between(data: bytes, start: int, end: int, size: int) -> bytes:
    """The records of `size` bytes of tokens `start` to `end`; those that Redis lost are unknown."""
    return data[start * size : end * size].ljust((end - start) * size, b"\0")


def prompt_record_bytes(request: BackendInput) -> int:
    """Size of the record of a token of this request's prompt; 0 where none are asked for."""
    asked = request.output_options.prompt_logprobs
    return 0 if asked is None else _prompt_record(asked).size


def pack_prompt_logprobs(rows: Iterable[PromptLogprob]) -> bytes:
    """The records of a prompt's tokens from the second one on."""
    return b"".join(
        _prompt_record(len(row.top)).pack(1, row.logprob, row.rank, *(value for pair in row.top for value in pair))
        for row in rows
    )


def unpack_prompt_logprobs(data: bytes, request: BackendInput) -> list[PromptLogprob | None]:
    """What is known of each token of the prompt; None for the first one, and for those whose records were lost."""
    size, count = prompt_record_bytes(request), len(request.token_ids) - 1
    record = _prompt_record(request.output_options.prompt_logprobs or 0)
    rows = record.iter_unpack(records_between(data, 0, count, size))
    return [None] + [
        PromptLogprob(logprob, rank, list(zip(top[0::2], top[1::2], strict=True))) if is_known else None
        for is_known, logprob, rank, *top in rows
    ]


@functools.cache
def _record(top: int) -> struct.Struct:
    return struct.Struct("<Bf" + "If" * top)


@functools.cache
def _prompt_record(top: int) -> struct.Struct:
    return struct.Struct("<BfI" + "If" * top)
