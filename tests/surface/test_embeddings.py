"""`/v1/embeddings` of a real system with the built-in model: vectors are Hugging Face's, whatever came together, and whatever dies."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio

from pipeline.builtin import model_place
from pipeline.redis_server import RedisServer
from pipeline.tokenizer import Tokenizer
from tests.serving import Served, serving
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/v1/embeddings"
SETTINGS = (
    f"pools.{POOL}.engine=torch",
    f"pools.{POOL}.embeddings=true",
    f"pools.{POOL}.matryoshka=true",
    "worker.lease_s=4",
)
TEXTS = [
    "A runner.",
    "Once upon a time there was a fox who ran. " * 9,
    "x",
    "The baton is handed over. " * 40,
    "Zürich 東京 🙂",
]
WIDTH = 256


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("embeddings")
    async with serving(default_redis_server, folder, *SETTINGS, stages="embed") as served:
        yield served


@cache
def model() -> Any:
    import torch
    import transformers

    return transformers.AutoModel.from_pretrained(model_place(POOL), dtype=torch.float32)


def ids_of(text: str) -> list[int]:
    return Tokenizer.load(POOL).encode(text, add_special_tokens=True)


def expected(token_ids: list[int]) -> np.ndarray:
    """The last token's hidden state by Hugging Face, of length 1."""
    import torch

    with torch.inference_mode():
        last = model()(torch.tensor([token_ids])).last_hidden_state[0, -1].numpy()
    return last / np.linalg.norm(last)


async def ask(served: Served, **fields: Any) -> httpx.Response:
    async with served.http() as http:
        return await http.post(PATH, json={"model": POOL, **fields})


async def test_vectors_are_those_of_hugging_face_alone_and_in_a_batch_in_the_order_of_the_inputs(
    served: Served,
) -> None:
    together = (await ask(served, input=TEXTS)).json()
    assert (together["object"], together["model"]) == ("list", POOL)
    assert [item["index"] for item in together["data"]] == [0, 1, 2, 3, 4]
    for text, item in zip(TEXTS, together["data"], strict=True):
        alone = (await ask(served, input=text)).json()
        assert set(item) == {"object", "index", "embedding"} and len(item["embedding"]) == WIDTH
        for vector in (item["embedding"], alone["data"][0]["embedding"]):
            np.testing.assert_allclose(vector, expected(ids_of(text)), atol=2e-6)
        assert alone["usage"] == dict.fromkeys(("prompt_tokens", "total_tokens"), len(ids_of(text)))
    assert together["usage"]["prompt_tokens"] == sum(len(ids_of(text)) for text in TEXTS)
    await served.system.until(served.rests)


async def test_token_ids_are_inputs_and_base64_is_the_same_numbers(served: Served) -> None:
    ids = [ids_of(text) for text in TEXTS]
    by_text = (await ask(served, input=TEXTS)).json()
    by_ids = (await ask(served, input=ids, encoding_format="base64", user="u", service_tier="flex")).json()
    assert by_ids["usage"] == by_text["usage"]
    for item, coded in zip(by_text["data"], by_ids["data"], strict=True):
        numbers = np.frombuffer(base64.b64decode(coded["embedding"]), dtype="<f4")
        np.testing.assert_allclose(numbers, item["embedding"], atol=2e-6)
    (one,) = (await ask(served, input=ids[0])).json()["data"]
    np.testing.assert_allclose(one["embedding"], expected(ids[0]), atol=2e-6)
    assert await served.system.counter("claimed:embed:low") > 0


async def test_the_official_client_reads_them_in_both_forms(served: Served) -> None:
    async with served.openai() as client:
        by_default = await client.embeddings.create(model=POOL, input=TEXTS)  # it asks for base64 and decodes it
        as_float = await client.embeddings.create(model=POOL, input=TEXTS, encoding_format="float")
    for text, one, other in zip(TEXTS, by_default.data, as_float.data, strict=True):
        np.testing.assert_allclose(one.embedding, expected(ids_of(text)), atol=2e-6)
        np.testing.assert_allclose(one.embedding, other.embedding, atol=2e-6)
    assert by_default.usage.total_tokens == as_float.usage.total_tokens == sum(len(ids_of(text)) for text in TEXTS)


async def test_dimensions_cut_a_vector_and_make_it_whole_again(served: Served) -> None:
    (item,) = (await ask(served, input="A runner.", dimensions=64)).json()["data"]
    cut = expected(ids_of("A runner."))[:64]
    np.testing.assert_allclose(item["embedding"], cut / np.linalg.norm(cut), atol=2e-6)
    (whole,) = (await ask(served, input="A runner.", dimensions=WIDTH)).json()["data"]
    assert len(whole["embedding"]) == WIDTH
    refused = await ask(served, input="A runner.", dimensions=WIDTH + 1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")


async def test_as_many_inputs_as_may_come_are_several_tasks_and_one_answer(served: Served) -> None:
    inputs = [[3 + position % 1500, 5] for position in range(2048)]
    before = await served.system.counter("ended:done")
    answer = await ask(served, input=inputs, encoding_format="base64")
    data = answer.json()["data"]
    assert [item["index"] for item in data] == list(range(2048))
    for position in (0, 1022, 1023, 1024, 2047):
        numbers = np.frombuffer(base64.b64decode(data[position]["embedding"]), dtype="<f4")
        np.testing.assert_allclose(numbers, expected(inputs[position]), atol=2e-6)
    assert await served.system.counter("ended:done") - before == 3, "1,023 vectors fit into queue.max_result_bytes"
    assert answer.headers["x-baton-request-id"].startswith(POOL)
    too_many = await ask(served, input=[*inputs, [3]])
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "input")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": ["a", "b", "c", [3] * 2]}, "invalid_request", "input[3]"),
        ({"input": [[3], [3], [3], [3] * 4097]}, "context_length_exceeded", "input[3]"),
        ({"input": "fox " * 4097}, "context_length_exceeded", "input"),
        ({"input": []}, "invalid_request", "input"),
        ({"input": ""}, "invalid_request", "input"),
        ({"input": ["a", ""]}, "invalid_request", "input[1]"),
        ({"input": [[]]}, "invalid_request", "input[0]"),
        ({"input": [5, 2048]}, "invalid_request", "input[1]"),
        ({"input": [[5, -1]]}, "invalid_request", "input[0][1]"),
        ({"input": 5}, "invalid_request", "input"),
        ({"input": "a", "encoding_format": "hex"}, "invalid_request", "encoding_format"),
        ({"input": "a", "dimensions": 0}, "invalid_request", "dimensions"),
        ({}, "invalid_request", "input"),
    ],
)
async def test_what_is_wrong_is_named(served: Served, fields: dict[str, Any], code: str, param: str) -> None:
    answer = await ask(served, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)


async def test_a_request_is_shown_as_one_without_text_and_has_no_stream(served: Served) -> None:
    request_id = (await ask(served, input="A runner.")).headers["x-baton-request-id"]
    async with served.http() as http:
        shown = (await http.get(f"/v1/requests/{request_id}")).json()
        stream = await http.get(f"/v1/streams/{request_id}")
    assert (shown["kind"], shown["state"], shown["stage"], shown["choices"]) == ("embedding", "done", "embed", [])
    assert shown["usage"]["prompt_tokens"] == len(ids_of("A runner."))
    assert (stream.status_code, stream.json()["error"]["param"]) == (400, "id")


async def test_the_same_key_reads_the_first_request(served: Served) -> None:
    before = await served.system.counter("admitted")
    async with served.http() as http:
        first, again = [
            await http.post(PATH, json={"model": POOL, "input": TEXTS}, headers={"Idempotency-Key": "embed-1"})
            for _ in range(2)
        ]
        other = await http.post(PATH, json={"model": POOL, "input": "x"}, headers={"Idempotency-Key": "embed-1"})
    assert first.json() == again.json()
    assert first.headers["x-baton-request-id"] == again.headers["x-baton-request-id"]
    assert other.status_code == 409
    assert await served.system.counter("admitted") == before + 1


async def test_metrics_count_the_requests(served: Served) -> None:
    await ask(served, input="A runner.")
    async with served.http() as http:
        text = (await http.get("/metrics")).text
    assert f'baton_requests_total{{kind="embedding",pool="{POOL}",state="done"}}' in text
    assert f'baton_claims_total{{lane="default",pool="{POOL}",stage="embed"}}' in text
    assert f'baton_workers{{pool="{POOL}",role="embed"}} 1.0' in text


# -- what dies, and who leaves: last, since they leave the module without its worker -------------------------------------------


def embed_worker(served: Served) -> subprocess.Popen[bytes]:
    return next(p for p in reversed(served.system.processes) if "embed" in p.args and p.poll() is None)  # type: ignore[operator]


async def test_without_a_worker_requests_wait_as_long_as_they_say_and_health_tells(served: Served) -> None:
    worker = embed_worker(served)
    worker.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(worker.wait, 30) == 0
    async with served.http() as http:
        asking = asyncio.create_task(
            http.post(PATH, json={"model": POOL, "input": TEXTS}, headers={"X-Request-Timeout": "3"})
        )
        health: dict[str, Any] = {}

        async def told() -> bool:
            health.update((await http.get("/health")).json())
            return "1 task on queue embed, and no worker of it is alive" in json.dumps(health)

        await served.system.until(told)
        answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "queue_timeout")
    assert answer.json()["error"]["message"] == "the request's time ran out in embed"
    await served.system.until(served.rests)


async def test_a_client_that_leaves_takes_its_tasks_along(served: Served) -> None:
    inputs = [[3] * 40] * 1100

    async def queued() -> bool:
        return await served.system.counter("waiting:embed:default") > 1

    async with served.http() as http:
        asking = asyncio.create_task(http.post(PATH, json={"model": POOL, "input": inputs}))
        await served.system.until(queued)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await served.system.until(served.rests)
    assert await served.ended("cancelled") > 1


async def test_an_answer_comes_although_its_worker_was_killed_in_the_middle(served: Served) -> None:
    """The only worker is stopped when it has claimed the first of several tasks, killed, and another one started."""
    inputs = [[3 + position % 1500, 7, 9] * 30 for position in range(600)]
    worker = await served.system.worker("embed")
    claimed, done = await served.system.counter("claimed:embed:default"), await served.ended("done")

    async def has_begun() -> bool:
        return await served.system.counter("claimed:embed:default") > claimed

    async with served.http() as http:
        asking = asyncio.create_task(http.post(PATH, json={"model": POOL, "input": inputs}))
        await served.system.until(has_begun)
        worker.kill()
        await asyncio.to_thread(worker.wait)
        assert await served.ended("done") < done + 7, "it was killed in the middle"
        assert not asking.done()
        await served.system.worker("embed")
        answer = await asking
    data = answer.json()["data"]
    assert len(data) == 600
    for position in (0, 1, 299, 599):
        np.testing.assert_allclose(data[position]["embedding"], expected(inputs[position]), atol=2e-6)
    await served.system.until(served.rests)


async def test_a_killed_engine_is_replaced_and_its_tasks_go_on(served: Served) -> None:
    import psutil

    inputs = [[3 + position % 1500, 7, 9] * 30 for position in range(600)]
    claimed = await served.system.counter("claimed:embed:default")

    async def has_begun() -> bool:
        return await served.system.counter("claimed:embed:default") > claimed

    async with served.http() as http:
        asking = asyncio.create_task(http.post(PATH, json={"model": POOL, "input": inputs}))
        await served.system.until(has_begun)
        (engine,) = psutil.Process(embed_worker(served).pid).children()
        engine.kill()
        answer = await asking
    assert answer.status_code == 200
    np.testing.assert_allclose(answer.json()["data"][599]["embedding"], expected(inputs[599]), atol=2e-6)
    await served.system.until(served.rests)
