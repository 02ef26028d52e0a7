"""Log probabilities of prompts over HTTP: prompt_logprobs, and echo with logprobs as evaluation harnesses ask for it; whole, streamed,
resumed and read again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
import transformers

from pipeline.builtin import model_place
from pipeline.redis_server import RedisServer
from pipeline.tokenizer import Tokenizer
from tests.serving import Served, serving
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

TORCH = f"pools.{POOL}.engine=torch"
TEXT = "What is Baton? It serves models through queues, 東京."
TOLERANCE = 1e-3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("logs")
    async with serving(
        default_redis_server, folder, TORCH, "engine.torch.max_num_batched_tokens=24", "engine.torch.max_num_seqs=8"
    ) as it:
        yield it


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(POOL)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model_place(POOL), dtype=torch.float32).eval()


def logs_of(model: Any, ids: list[int]) -> list[list[float]]:
    with torch.inference_mode():
        logs: list[list[float]] = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).tolist()
    return logs


async def post(http: httpx.AsyncClient, path: str = "completions", **body: Any) -> dict[str, Any]:
    answer = await http.post(f"/v1/{path}", json={"model": POOL, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def chunks_of(
    http: httpx.AsyncClient, path: str, headers: dict[str, str] | None = None, **body: Any
) -> list[dict[str, Any]]:
    asked = {"model": POOL, "temperature": 0, "stream": True, **body}
    answer = await (http.post(path, json=asked, headers=headers) if body else http.get(path, headers=headers))
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def joined(chunks: list[dict[str, Any]], choice: int = 0) -> dict[str, list[Any]]:
    """The log probabilities of a choice, as its events told them."""
    own = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice and one.get("logprobs")]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [value for one in own for value in one["logprobs"][name]] for name in names}


def check_entries(entries: list[Any], ids: list[int], logs: list[list[float]], top: int, tokenizer: Tokenizer) -> None:
    assert entries[0] is None
    for position, entry in enumerate(entries[1:], start=1):
        expected, own = logs[position - 1], entry[str(ids[position])]
        assert own["logprob"] == pytest.approx(expected[ids[position]], abs=TOLERANCE)
        assert own["decoded_token"] == tokenizer.decode([ids[position]], skip_special_tokens=False)
        ranked = sorted((one["rank"], one["logprob"]) for token, one in entry.items())
        assert [value for _, value in ranked[:top]] == pytest.approx(sorted(expected)[-top:][::-1], abs=TOLERANCE)
        assert [rank for rank, _ in ranked[:top]] == list(range(1, top + 1))
        assert len(entry) in (top, top + 1)


async def test_prompt_logprobs_of_completions_and_chats(served: Served, tokenizer: Tokenizer, model: Any) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=True)
    async with served.http() as http:
        whole = await post(http, prompt=TEXT, max_tokens=3, prompt_logprobs=2, n=2, seed=1)
        for choice in whole["choices"]:
            check_entries(choice["prompt_logprobs"], ids, logs_of(model, ids), 2, tokenizer)
            assert "logprobs" not in choice
        messages = [{"role": "user", "content": "Hello there, what is Baton?"}]
        chat = await post(http, "chat/completions", messages=messages, max_tokens=3, prompt_logprobs=1)
        rendered = await post(http, "../tokenize", messages=messages)
        check_entries(chat["prompt_logprobs"], rendered["tokens"], logs_of(model, rendered["tokens"]), 1, tokenizer)
        assert "prompt_logprobs" not in chat["choices"][0]
        streamed = await chunks_of(http, "/v1/completions", prompt=TEXT, max_tokens=3, prompt_logprobs=2, n=2, seed=1)
        told = [one for chunk in streamed for one in chunk["choices"] if "prompt_logprobs" in one]
        assert {one["index"]: one["prompt_logprobs"] for one in told} == {
            0: told[0]["prompt_logprobs"],
            1: told[0]["prompt_logprobs"],
        }
        assert len(told) == 2
        check_entries(told[0]["prompt_logprobs"], ids, logs_of(model, ids), 2, tokenizer)
        streamed = await chunks_of(http, "/v1/chat/completions", messages=messages, max_tokens=3, prompt_logprobs=1)
        assert [len(chunk["prompt_logprobs"]) for chunk in streamed if "prompt_logprobs" in chunk] == [
            len(rendered["tokens"])
        ]


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
async def test_an_echo_with_log_probabilities(
    served: Served, tokenizer: Tokenizer, model: Any, max_tokens: int
) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=True)
    body = {"prompt": TEXT, "max_tokens": max_tokens, "logprobs": 2, "echo": True, "ignore_eos": True}
    async with served.http() as http:
        whole = await post(http, **body)
        [choice] = whole["choices"]
        assert choice["text"].startswith(TEXT)
        assert (choice["text"] == TEXT) is (max_tokens == 0)
        assert choice["finish_reason"] == "length"
        assert whole["usage"]["completion_tokens"] == max_tokens
        assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        told = choice["logprobs"]
        assert {len(values) for values in told.values()} == {len(ids) + max_tokens}
        logs = logs_of(model, ids)
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        expected = [row[token] for row, token in zip(logs, ids[1:], strict=False)]
        assert told["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=TOLERANCE)
        for offset, token in zip(told["text_offset"], told["tokens"], strict=True):
            is_shown = "\ufffd" not in token and not token.startswith("<|")  # nor torn, nor special
            assert not is_shown or choice["text"][offset:].startswith(token)
        assert told["text_offset"][1] == 0  # in front of it stands a special token, which is not shown
        streamed = await chunks_of(http, "/v1/completions", **body)
        assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == choice["text"]
        again = joined(streamed)
        assert again["tokens"] == told["tokens"]
        assert again["text_offset"] == told["text_offset"]
        assert again["token_logprobs"][1:] == pytest.approx(told["token_logprobs"][1:], abs=TOLERANCE)


def loglikelihood(choice: dict[str, Any], context: int) -> tuple[float, bool]:
    """As lm-evaluation-harness reads an answer to `max_tokens` 1, `logprobs` 1 and `echo`."""
    tokens = choice["logprobs"]["token_logprobs"][context:-1]
    tops = choice["logprobs"]["top_logprobs"][context:-1]
    return sum(tokens), all(token == max(top.values()) for token, top in zip(tokens, tops, strict=True))


async def test_loglikelihoods_as_a_harness_asks_for_them(served: Served, tokenizer: Tokenizer, model: Any) -> None:
    context = tokenizer.encode("What is Baton?", add_special_tokens=True)
    async with served.http() as http:
        [greedy] = (await post(http, prompt=context, max_tokens=6, return_token_ids=True, ignore_eos=True))["choices"]
        other = [*greedy["token_ids"][:3], (greedy["token_ids"][3] + 1) % tokenizer.vocab_size]
        prompts = [context + greedy["token_ids"], context + other]
        answers = await post(http, prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1234)
    found = [loglikelihood(choice, len(context)) for choice in answers["choices"]]
    assert [is_greedy for _, is_greedy in found] == [True, False]
    for (total, _), ids in zip(found, prompts, strict=True):
        logs = logs_of(model, ids)
        expected = sum(logs[at - 1][ids[at]] for at in range(len(context), len(ids)))
        assert total == pytest.approx(expected, abs=len(ids) * TOLERANCE)


async def test_every_reader_is_told_the_same(served: Served) -> None:
    """A second request under the same key, the stream from its start and from each of its events, and the record of the request."""
    body = {"prompt": TEXT, "max_tokens": 4, "logprobs": 1, "echo": True, "prompt_logprobs": 3, "ignore_eos": True}
    headers = {"X-Baton-Resumable": "true", "Idempotency-Key": "again"}
    async with served.http() as http:
        answer = await http.post(
            "/v1/completions", json={"model": POOL, "temperature": 0, "stream": True, **body}, headers=headers
        )
        assert answer.status_code == 200, answer.text
        request_id = answer.headers["x-baton-request-id"]
        blocks = [block for block in answer.text.split("\n\n") if block.startswith("id: ")]
        assert len(blocks) >= 5
        assert blocks[0].count("prompt_logprobs") == 1
        assert not any("prompt_logprobs" in block for block in blocks[1:])
        assert (await http.get(f"/v1/streams/{request_id}")).text == answer.text
        for seen, block in enumerate(blocks, start=1):
            name = block.split("\n")[0].removeprefix("id: ")
            rest = await http.get(f"/v1/streams/{request_id}", headers={"Last-Event-ID": name})
            assert [one for one in rest.text.split("\n\n") if one.startswith("id: ")] == blocks[seen:]
        repeated = await http.post("/v1/completions", json={"model": POOL, "temperature": 0, **body}, headers=headers)
        [choice] = repeated.json()["choices"]
        streamed = [json.loads(block.split("data: ", 1)[1]) for block in blocks]
        assert choice["logprobs"] == joined(streamed)
        assert choice["prompt_logprobs"] == streamed[0]["choices"][0]["prompt_logprobs"]
        record = (await http.get(f"/v1/requests/{request_id}")).json()
        assert record["choices"][0]["logprobs"] == choice["logprobs"]
        assert record["choices"][0]["prompt_logprobs"] == choice["prompt_logprobs"]


async def test_what_is_too_much_or_says_nothing_is_refused(served: Served) -> None:
    async with served.http() as http:
        for body, param, says in (
            ({"prompt": [5] * 1700, "n": 8, "prompt_logprobs": 20}, "prompt_logprobs", "285600 entries"),
            ({"prompt": [[5] * 700] * 19, "logprobs": 20, "echo": True}, "logprobs", "279300 entries"),
            ({"prompt": "a", "max_tokens": 0}, "max_tokens", "nothing to answer"),
            ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs", "20"),
        ):
            answer = await http.post("/v1/completions", json={"model": POOL, **body})
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["param"] == param
            assert says in error["message"]


async def test_the_best_of_some_are_the_likeliest_answers_whatever_is_echoed(served: Served) -> None:
    asked = {"prompt": TEXT, "max_tokens": 6, "best_of": 4, "n": 2, "temperature": 1.3, "seed": 8}
    async with served.http() as http:
        plain = await post(http, **asked)
        echoed = await post(http, **asked, echo=True, logprobs=1)
    assert [TEXT + choice["text"] for choice in plain["choices"]] == [choice["text"] for choice in echoed["choices"]]
    assert all(choice["logprobs"]["token_logprobs"][0] is None for choice in echoed["choices"])
