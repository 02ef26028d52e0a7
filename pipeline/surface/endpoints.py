"""Endpoints without HTTP: a body becomes requests, and what became of them its one answer. For whoever sends bodies and reads no stream.

body = endpoint.read(raw)                        InvalidRequest with its path
requests = endpoint.requests(pool, body, asker)  InvalidRequest, ContextLengthExceeded
... each is admitted to `endpoint.stage`, and read when it has ended ...
endpoint.answer(pool, body, answered)            RequestFailed and its like
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from pipeline.embeddings import embedding_request, parts_of, vectors_of
from pipeline.errors import InvalidRequest
from pipeline.ids import new_request_id
from pipeline.pools import ServedPool
from pipeline.protocol import BackendInput, Request
from pipeline.queue import EMBED
from pipeline.stream import Ended, TokenChunk, total
from pipeline.surface.asks import check_prompt_logprobs
from pipeline.surface.bodies import ChatBody, CompletionBody, chat_body, completion_body
from pipeline.surface.collected import Collected
from pipeline.surface.embedding_answers import embeddings_body
from pipeline.surface.embedding_bodies import EmbeddingBody, dimensions_of, embedding_body, offered, several, token_ids
from pipeline.surface.errors import check_end
from pipeline.surface.inputs import inputs_of, response_input
from pipeline.surface.response_transcript import ResponseTranscript
from pipeline.surface.responses_bodies import ResponseBody, response_body
from pipeline.surface.shapes.openai import OpenAIShape

B = TypeVar("B", bound="ChatBody | CompletionBody | ResponseBody | EmbeddingBody")


@dataclasses.dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, and how: in whose name, on which lane, with answers in which words."""

    owner: str
    lane: str
    reasoning_field: str
    max_prompt_logprobs: int


@dataclasses.dataclass(frozen=True, slots=True)
class Answered:
    """One request that has ended: as it is stored, all its tokens, its end, and the result of its task."""

    request: Request
    chunks: Sequence[TokenChunk]
    ended: Ended
    result: bytes = b""


class Endpoint(Protocol[B]):
    """See the module's docstring. `stage`: where requests start; empty where the router says."""

    @property
    def stage(self) -> str: ...

    def read(self, raw: bytes) -> B: ...

    def requests(self, pool: ServedPool, body: B, asker: Asker) -> list[Request]: ...

    def answer(self, pool: ServedPool, body: B, asker: Asker, answered: Sequence[Answered]) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class _Texts:
    """Chats and completions."""

    kind: str
    decode: Callable[[bytes], ChatBody | CompletionBody]
    stage: str = ""

    def read(self, raw: bytes) -> ChatBody | CompletionBody:
        body = self.decode(raw)
        _refuse_streams(body)
        return body

    def requests(self, pool: ServedPool, body: ChatBody | CompletionBody, asker: Asker) -> list[Request]:
        inputs = inputs_of(pool, body, "")
        check_prompt_logprobs(body, inputs, asker.max_prompt_logprobs)
        return [_request(self.kind, ready, asker) for ready in inputs]

    def answer(
        self, pool: ServedPool, body: ChatBody | CompletionBody, asker: Asker, answered: Sequence[Answered]
    ) -> bytes:
        answers = []
        for one in answered:
            collected = Collected(pool.preprocessor.tokenizer, one.request)
            collected.push(one.chunks)
            check_end(one.ended, is_complete=collected.choices.are_complete)
            answers.append((one.request, collected.all()))
        usage = total(one.ended.usage for one in answered)
        return msgspec.json.encode(OpenAIShape(asker.reasoning_field).of_several(answers, usage))


class _Responses:
    """Responses that nobody can read again: they are in the answer alone."""

    stage = ""

    def read(self, raw: bytes) -> ResponseBody:
        body = response_body(raw)
        _refuse_streams(body)
        if body.previous_response_id is not None:
            raise InvalidRequest(
                "previous_response_id: here is no conversation to go on from: send its items as `input`",
                param="previous_response_id",
            )
        return msgspec.structs.replace(body, store=False)

    def requests(self, pool: ServedPool, body: ResponseBody, asker: Asker) -> list[Request]:
        request_id = new_request_id(pool.name)
        return [_request("response", response_input(pool, request_id, body, [], asker.lane), asker)]

    def answer(self, pool: ServedPool, body: ResponseBody, asker: Asker, answered: Sequence[Answered]) -> bytes:
        (one,) = answered
        transcript = ResponseTranscript.unread(pool.preprocessor.tokenizer, one.request)
        transcript.push(one.chunks)
        check_end(one.ended, is_complete=transcript.choices.are_complete)
        return msgspec.json.encode(transcript.response(one.ended))


class _Embeddings:
    """Vectors."""

    stage = EMBED

    def read(self, raw: bytes) -> EmbeddingBody:
        return embedding_body(raw)

    def requests(self, pool: ServedPool, body: EmbeddingBody, asker: Asker) -> list[Request]:
        offer = offered(pool, body.model)
        dimensions = dimensions_of(body, offer)
        sequences = token_ids(pool, several(body.input))
        return [
            embedding_request(
                new_request_id(pool.name), pool.name, sequences[part.start : part.stop], dimensions,
                created_s=int(time.time()), owner=asker.owner,
            )
            for part in parts_of([len(tokens) for tokens in sequences], offer.part_inputs)
        ]  # fmt: skip

    def answer(self, pool: ServedPool, body: EmbeddingBody, asker: Asker, answered: Sequence[Answered]) -> bytes:
        vectors: list[bytes] = []
        for one in answered:
            check_end(one.ended, is_complete=True)
            assert one.request.task is not None
            vectors += vectors_of(one.request.id, one.result, len(one.request.task.args[0]))
        tokens = sum(len(one.request.input.token_ids) for one in answered)
        return embeddings_body(pool.name, vectors, tokens, as_base64=body.encoding_format == "base64")


ENDPOINTS: dict[str, Endpoint[Any]] = {
    "/v1/chat/completions": _Texts("chat.completion", chat_body),
    "/v1/completions": _Texts("text_completion", completion_body),
    "/v1/embeddings": _Embeddings(),
    "/v1/responses": _Responses(),
}


def _request(kind: str, ready: BackendInput, asker: Asker) -> Request:
    return Request(id=ready.request_id, kind=kind, created_s=int(time.time()), input=ready, owner=asker.owner)


def _refuse_streams(body: ChatBody | CompletionBody | ResponseBody) -> None:
    for field in ("stream", "background"):
        if getattr(body, field, None):
            raise InvalidRequest(f"{field}: here every answer is whole, leave it out", param=field)
