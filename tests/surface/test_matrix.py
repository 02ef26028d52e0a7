"""A matrix of requests over all endpoints and fields: every body and every event is of the types that OpenAI and Anthropic publish, to
the letter, and says what was asked for. What is said beyond those types is listed in `tests/openai_types.py`.

All requests go to one server, several at once; then each answer is a test of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from anthropic.types import message_count_tokens_params as count_params
from anthropic.types import message_create_params as message_params
from openai.types import EmbeddingCreateParams, batch_create_params, file_create_params
from openai.types import completion_create_params as completion_params
from openai.types.chat import ChatCompletion
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params
from pydantic import ValidationError

from api.files import FileForm
from pipeline.batches.creating import BatchBody
from pipeline.builtin import builtin_model_path
from pipeline.redis_server import RedisServer
from pipeline.surface.anthropic_bodies import CountBody, MessageBody
from pipeline.surface.bodies import ChatBody, CompletionBody
from pipeline.surface.embedding_bodies import EmbeddingBody
from pipeline.surface.responses_bodies import ResponseBody
from tests.openai_types import strictly
from tests.serving import Served
from tests.surface.matrix import batches, chats, completions, errors, files, messages, others, responses
from tests.surface.matrix.case import KEYS, THINKER, Answer, Asking, Case
from tests.system import POOL, System

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]  # five engines start on what is free

CASES: list[Case] = [
    *chats.CASES,
    *completions.CASES,
    *responses.CASES,
    *messages.CASES,
    *others.CASES,
    *files.CASES,
    *batches.CASES,
    *errors.CASES,
]
FEWEST = 150

SETTINGS = (
    *(f"pools.{pool}.engine=torch" for pool in (POOL, THINKER)),
    f"pools.{THINKER}.model={POOL}",
    f"pools.{POOL}.embeddings=true",
    f"pools.{POOL}.matryoshka=true",
    "api.body_limit_bytes=200000",
    "files.max_bytes=100000",
    "queue.low.max_waiting_tokens=500",
    "queue.high.max_waiting_tokens=500",
)
LIMITED = {
    "other-models": 'models = ["elsewhere"]',
    "one-request": "requests_per_minute = 1",
    "few-tokens": "tokens_per_minute = 3",
}


def keys_file(folder: Path) -> Path:
    path = folder / "keys.toml"
    tables = [
        f'[{name}]\ndigest = "{hashlib.sha256(key.encode()).hexdigest()}"\n{LIMITED.get(name, "")}\n'
        for name, key in KEYS.items()
    ]
    path.write_text("\n".join(tables))
    return path


def thinking_template(folder: Path) -> Path:
    """The model's own response template, and thoughts."""
    template = json.loads((builtin_model_path() / "tokenizer_config.json").read_text())["response_template"]
    template["fields"]["thinking"] = {"open": "<think>", "close_pattern": "</think>\\n*"}
    path = folder / "thinks.json"
    path.write_text(json.dumps(template))
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("matrix")
    settings = [f"api.keys_file={keys_file(folder)}", f"pools.{THINKER}.response_template={thinking_template(folder)}"]
    default_redis_server.command("FLUSHALL")
    async with System(default_redis_server.url, *SETTINGS, *settings, log_dir=folder) as system:
        workers = (system.worker(stage, pool=POOL) for stage in ("prefill", "decode", "embed"))
        url, *_ = await asyncio.gather(system.api(), *workers)
        await asyncio.gather(*(system.worker(stage, pool=THINKER) for stage in ("prefill", "decode")))
        yield Served(system, url, folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def answers(served: Served) -> dict[str, Answer]:
    async with served.http() as http:
        return await Asking(http, CASES).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
async def test_an_answer_is_what_was_asked_for(case: Case, answers: dict[str, Answer]) -> None:
    answer = answers[case.id]
    assert answer.status == case.status, answer.content[:500]
    case.check(answer)
    if case.more is not None:
        case.more(answer)
    if case.like:
        like = answers[case.like]
        if not like.said:
            like.case.check(like)
        assert [one.same() for one in answer.said] == [one.same() for one in like.said]
    assert answer.headers["x-request-id"]


async def test_who_reads_a_cancelled_request_is_told_so_in_the_shape_of_errors(served: Served) -> None:
    """Two read one request under its key, one as a stream: an event and a status."""
    headers = {"Idempotency-Key": "cancelled", "Authorization": f"Bearer {KEYS['all']}"}
    body = chats.BASE | {"ignore_eos": True, "max_tokens": 3000}
    async with (
        served.http() as http,
        http.stream("POST", chats.PATH, json=body | {"stream": True}, headers=headers) as stream,
    ):
        whole = asyncio.create_task(http.post(chats.PATH, json=body, headers=headers))
        request_id = stream.headers["x-baton-request-id"]

        async def has_two_readers() -> bool:
            return 'baton_live_requests{pool="baton-tiny"} 2.0' in (await http.get("/metrics", headers=headers)).text

        await served.system.until(has_two_readers, 20)
        await http.post(f"/v1/requests/{request_id}/cancel", headers=headers)
        *_, last, done = [line async for line in stream.aiter_lines() if line]
        answer = await whole
    assert done == "data: [DONE]"
    assert answer.status_code == 499
    for error in (json.loads(last.removeprefix("data: ")), answer.json()):
        assert errors.error_of(error).code == "cancelled"


async def test_a_field_that_is_not_listed_would_be_noticed(answers: dict[str, Answer]) -> None:
    body = answers["chat/plain/whole"].json
    with pytest.raises(AssertionError, match="has unknown fields"):
        strictly(ChatCompletion, {**body, "choices": [{**body["choices"][0], "more": 1}]})
    with pytest.raises(ValidationError):
        strictly(ChatCompletion, {**body, "created": str(body["created"])})


FIELDS: list[tuple[str, Any, Any]] = [
    (chats.PATH, ChatBody, chat_params.CompletionCreateParamsBase),
    (completions.PATH, CompletionBody, completion_params.CompletionCreateParamsBase),
    (responses.PATH, ResponseBody, response_params.ResponseCreateParamsBase),
    (messages.PATH, MessageBody, message_params.MessageCreateParamsBase),
    (messages.COUNT, CountBody, count_params.MessageCountTokensParams),
    (others.PATH, EmbeddingBody, EmbeddingCreateParams),
    (files.PATH, FileForm, file_create_params.FileCreateParams),
    (batches.PATH, BatchBody, batch_create_params.BatchCreateParams),
]


@pytest.mark.parametrize(("path", "ours", "published"), FIELDS, ids=[path for path, _, _ in FIELDS])
async def test_every_field_is_asked_for(path: str, ours: Any, published: Any) -> None:
    """Those that Baton knows, and those that the clients have arguments for."""
    asked = {field for case in CASES if case.path == path for field in case.asked}
    asked |= {field.partition("[")[0] for field in asked}  # of a form
    missing = {*(field.encode_name for field in msgspec.structs.fields(ours)), *published.__annotations__} - asked
    assert not missing


async def test_nothing_is_left(served: Served, answers: dict[str, Answer]) -> None:
    await served.system.until(served.rests, 10)
    assert "Traceback" not in served.api_log()


async def test_the_matrix_is_as_large_as_it_says(
    answers: dict[str, Answer], capsys: pytest.CaptureFixture[str]
) -> None:
    distinct = {
        (
            case.method,
            case.path,
            str(case.body),
            str(case.form),
            str(case.params),
            str(case.headers),
            case.key,
            case.after,
        )
        for case in CASES
    }
    assert len(distinct) == len(CASES) == len(answers) >= FEWEST
    events = sum(answer.num_events for answer in answers.values())
    with capsys.disabled():
        print(f"\nmatrix: {len(distinct)} requests, {events} events of streams")
