"""The table of routes: what each takes, answers and refuses. A test holds it against the routes of the application."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from api.files import FileForm
from api.guard import METRICS_PATH, OPENAPI_PATH
from api.openapi import answers, batch_answers, examples, file_answers, message_answers, response_answers
from api.openapi.examples import Example
from api.tokenizing import DetokenizeBody, TokenizeBody
from pipeline.batches.creating import BatchBody
from pipeline.surface.anthropic_bodies import CountBody, MessageBody
from pipeline.surface.anthropic_errors import MESSAGES_PATH
from pipeline.surface.bodies import ChatBody, CompletionBody
from pipeline.surface.embedding_bodies import EmbeddingBody
from pipeline.surface.responses_bodies import ResponseBody

TREATMENT = ("X-Baton-Resumable", "X-Baton-Linger", "X-Request-Timeout", "x-stainless-read-timeout", "Idempotency-Key")
ID, RESPONSE_ID, FILE_ID, BATCH_ID = ("request_id",), ("response_id",), ("file_id",), ("batch_id",)

READS_BODY = (
    "invalid_request",
    "body_timeout",
    "body_too_large",
    "unsupported_media_type",
    "rate_limit_exceeded",
    "draining",
)
OF_MODEL = ("permission_denied", "model_not_found", "unsupported_parameter")
READS_TEXT = (*READS_BODY, *OF_MODEL)
GENERATES = (
    *READS_TEXT, "context_length_exceeded", "idempotency_conflict", "concurrency_limit_exceeded", "resource_unavailable",
    "overloaded", "refused", "cancelled", "queue_timeout",
)  # fmt: skip
FINDS = ("permission_denied", "request_not_found")
FINDS_FILE = ("permission_denied", "file_not_found", "storage_unavailable")
FINDS_BATCH = ("permission_denied", "batch_not_found")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path; what is read by GET answers HEAD, too. `answer`: the type of a 200, None where it is no JSON; `events`: those
    of the data of a stream's events, where it may be one; `others`: further answers by status that are no errors; `also`: another path;
    `is_form`: the body is a form with a file; `is_file`: the answer is bytes of one, or a range of them."""

    path: str
    id: str
    summary: str
    tag: str
    method: str = "post"
    body: type | None = None
    answer: Any = None
    events: tuple[Any, ...] = ()
    others: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    needs_key: bool = True
    also: str = ""
    is_form: bool = False
    is_file: bool = False


CHATS, TOKENS, RESPONSES, FILES, BATCHES = "text", "tokens", "responses", "files", "batches"
REQUESTS, OPERATORS = "requests", "operators"

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        path="/v1/chat/completions", id="createChatCompletion", tag=CHATS, summary="A chat goes on",
        body=ChatBody, answer=answers.ChatCompletion, events=(answers.ChatChunk,), parameters=TREATMENT, errors=GENERATES,
        examples=examples.CHATS,
    ),
    Operation(
        path="/v1/completions", id="createCompletion", tag=CHATS, summary="A text, or token ids, go on",
        body=CompletionBody, answer=answers.Completion, events=(answers.CompletionChunk,), parameters=TREATMENT, errors=GENERATES,
        examples=examples.COMPLETIONS,
    ),
    Operation(
        path=MESSAGES_PATH, id="createMessage", tag=CHATS, summary="A chat goes on, as Anthropic's clients say it",
        body=MessageBody, answer=message_answers.MessageAnswer, events=(message_answers.MessageEvent,), parameters=TREATMENT,
        errors=GENERATES, examples=examples.MESSAGES,
    ),
    Operation(
        path=f"{MESSAGES_PATH}/count_tokens", id="countTokens", tag=TOKENS, summary="The tokens of a message's prompt; nothing is queued",
        body=CountBody, answer=message_answers.TokenCount, errors=READS_TEXT, examples=examples.COUNTS,
    ),
    Operation(
        path="/v1/embeddings", id="createEmbeddings", tag=TOKENS,
        summary="Vectors of texts or token ids; the pool needs `embeddings = true` and the torch engine",
        body=EmbeddingBody, answer=answers.Embeddings, parameters=TREATMENT, errors=GENERATES, examples=examples.EMBEDDINGS,
    ),
    Operation(
        path="/tokenize", also="/v1/tokenize", id="tokenize", tag=TOKENS, summary="Text to token ids",
        body=TokenizeBody, answer=answers.Tokenized, errors=READS_TEXT, examples=examples.TOKENIZE,
    ),
    Operation(
        path="/detokenize", also="/v1/detokenize", id="detokenize", tag=TOKENS, summary="Token ids to text",
        body=DetokenizeBody, answer=answers.Detokenized, errors=READS_TEXT, examples=examples.DETOKENIZE,
    ),
    Operation(
        path="/v1/responses", id="createResponse", tag=RESPONSES, summary="A response, whole, as a stream or in the background",
        body=ResponseBody, answer=response_answers.ResponseObject, events=(response_answers.ResponseEvent,), parameters=TREATMENT,
        errors=(*GENERATES, "previous_response_not_found"), examples=examples.RESPONSES,
    ),
    Operation(
        path="/v1/responses/{response_id}", id="getResponse", tag=RESPONSES, method="get",
        summary="A response as it stands; with `stream=true` its events, from the start or behind `starting_after`",
        answer=response_answers.ResponseObject, events=(response_answers.ResponseEvent,),
        parameters=(*RESPONSE_ID, "stream", "starting_after"), errors=(*FINDS, "invalid_request", "draining"),
    ),
    Operation(
        path="/v1/responses/{response_id}", id="deleteResponse", tag=RESPONSES, method="delete",
        summary="Forgets a response; one that is not complete is cancelled first",
        answer=response_answers.DeletedResponse, parameters=RESPONSE_ID, errors=FINDS,
    ),
    Operation(
        path="/v1/responses/{response_id}/input_items", id="listInputItems", tag=RESPONSES, method="get",
        summary="What a response was asked, with the conversation before it",
        answer=response_answers.InputItemList, parameters=(*RESPONSE_ID, "order", "limit", "after"), errors=(*FINDS, "invalid_request"),
    ),
    Operation(
        path="/v1/responses/{response_id}/cancel", id="cancelResponse", tag=RESPONSES, summary="Ends a response of the background",
        answer=response_answers.ResponseObject, parameters=RESPONSE_ID, errors=(*FINDS, "invalid_request"),
    ),
    Operation(
        path="/v1/files", id="createFile", tag=FILES, summary="Keeps a file, whose bytes go straight into the store",
        body=FileForm, is_form=True, answer=file_answers.FileObject,
        errors=(
            "invalid_request", "permission_denied", "body_too_large", "file_too_large", "upload_timeout", "unsupported_media_type",
            "rate_limit_exceeded", "draining", "storage_unavailable", "overloaded",
        ),
    ),
    Operation(
        path="/v1/files", id="listFiles", tag=FILES, method="get", summary="The caller's files, a page at a time",
        answer=file_answers.Files, parameters=("order", "files_limit", "files_after", "purpose"),
        errors=("invalid_request", "permission_denied"),
    ),
    Operation(
        path="/v1/files/{file_id}", id="getFile", tag=FILES, method="get", summary="What is known of a file",
        answer=file_answers.FileObject, parameters=FILE_ID, errors=FINDS_FILE,
    ),
    Operation(
        path="/v1/files/{file_id}", id="deleteFile", tag=FILES, method="delete", summary="Forgets a file and its bytes",
        answer=file_answers.DeletedFile, parameters=FILE_ID, errors=FINDS_FILE,
    ),
    Operation(
        path="/v1/files/{file_id}/content", id="getFileContent", tag=FILES, method="get", summary="Its bytes, or a range of them",
        is_file=True, parameters=(*FILE_ID, "Range", "If-Range"), errors=(*FINDS_FILE, "range_not_satisfiable"),
    ),
    Operation(
        path="/v1/batches", id="createBatch", tag=BATCHES, summary="A file of requests is answered, at low priority",
        body=BatchBody, answer=batch_answers.BatchObject, parameters=("Idempotency-Key",), examples=examples.BATCHES,
        errors=(*READS_BODY, "permission_denied", "idempotency_conflict", "overloaded"),
    ),
    Operation(
        path="/v1/batches", id="listBatches", tag=BATCHES, method="get", summary="The caller's batches, a page at a time, the newest first",
        answer=batch_answers.Batches, parameters=("batches_limit", "batches_after"), errors=("invalid_request", "permission_denied"),
    ),
    Operation(
        path="/v1/batches/{batch_id}", id="getBatch", tag=BATCHES, method="get", summary="A batch as it stands",
        answer=batch_answers.BatchObject, parameters=BATCH_ID, errors=FINDS_BATCH,
    ),
    Operation(
        path="/v1/batches/{batch_id}/cancel", id="cancelBatch", tag=BATCHES,
        summary="Ends a batch, and keeps what has been answered; one that has ended stays what it is",
        answer=batch_answers.BatchObject, parameters=BATCH_ID, errors=FINDS_BATCH,
    ),
    Operation(
        path="/v1/streams/{request_id}", id="readStream", tag=REQUESTS, method="get",
        summary="The stream of a request from its start, or behind `Last-Event-ID`",
        events=(answers.ChatChunk, answers.CompletionChunk, message_answers.MessageEvent),
        parameters=(*ID, "Last-Event-ID", "last_event_id"),
        errors=(*FINDS, "invalid_request", "draining", "cancelled", "queue_timeout"),
    ),
    Operation(
        path="/v1/requests/{request_id}", id="getRequest", tag=REQUESTS, method="get",
        summary="Where a request stands, and what it says so far", answer=answers.RequestRecord, parameters=ID, errors=FINDS,
    ),
    Operation(
        path="/v1/requests/{request_id}/cancel", id="cancelRequest", tag=REQUESTS,
        summary="Ends a request; one that has ended stays what it is",
        answer=answers.CancelledRequest, parameters=ID, errors=FINDS,
    ),
    Operation(
        path="/v1/models", id="listModels", tag=OPERATORS, method="get", summary="The models that the caller may use",
        answer=answers.Models, errors=("permission_denied",),
    ),
    Operation(
        path="/v1/models/{model}", id="getModel", tag=OPERATORS, method="get", summary="One of them",
        answer=answers.Model, parameters=("model",), errors=("permission_denied", "model_not_found"),
    ),
    Operation(
        path="/live", id="live", tag=OPERATORS, method="get", needs_key=False, summary="200 while the process runs",
        answer=answers.Alive,
    ),
    Operation(
        path="/ready", id="ready", tag=OPERATORS, method="get", needs_key=False,
        summary="200 while requests may be sent here", answer=answers.Alive, others={503: answers.Unready},
    ),
    Operation(
        path="/health", id="health", tag=OPERATORS, method="get", needs_key=False,
        summary="Everything that is wrong; 503 when a request sent now could not be answered",
        answer=answers.Health, others={503: answers.Health},
    ),
    Operation(
        path="/version", id="version", tag=OPERATORS, method="get", needs_key=False, summary="Of Baton", answer=answers.Version,
    ),
    Operation(
        path="/v1/scaling/{pool}", id="scaling", tag=OPERATORS, method="get", answer=answers.Scaling, parameters=("pool",),
        summary="How many workers the stages of a pool should have, and why; any valid key opens it",
        errors=("model_not_found",),
    ),
    Operation(
        path=METRICS_PATH, id="metrics", tag=OPERATORS, method="get",
        summary="Prometheus; any valid key opens it, and `api.metrics_need_key = false` without one",
    ),
    Operation(
        path=OPENAPI_PATH, id="openapi", tag=OPERATORS, method="get", needs_key=False, summary="This page", answer=dict[str, Any],
    ),
)  # fmt: skip
