"""`/tokenize` and `/detokenize` over HTTP, without any worker: what vLLM's clients send, and what they get."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from pipeline.redis_server import RedisServer
from pipeline.tokenizer import Conversation, Tokenizer
from tests.serving import Served, serving
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "Zürich, 東京 🙂 and a fox."
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    settings = f"pools.{POOL}.engine=torch"  # whose context is the model's
    async with serving(default_redis_server, tmp_path_factory.mktemp("served"), settings, stages="") as served:
        yield served


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(POOL)


async def post(served: Served, path: str, **body: Any) -> httpx.Response:
    async with served.http() as http:
        return await http.post(path, json=body)


@pytest.mark.parametrize("root", ["", "/v1"])
async def test_a_prompt_becomes_tokens_and_they_become_the_prompt(
    served: Served, tokenizer: Tokenizer, root: str
) -> None:
    answer = (await post(served, f"{root}/tokenize", model=POOL, prompt=TEXT, add_special_tokens=False)).json()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert answer == {"count": len(ids), "max_model_len": 4096, "tokens": ids, "token_strs": None}
    assert (await post(served, f"{root}/detokenize", model=POOL, tokens=ids)).json() == {"prompt": TEXT}


async def test_special_tokens_come_unless_they_are_not_wanted_and_are_shown(
    served: Served, tokenizer: Tokenizer
) -> None:
    answer = (await post(served, "/tokenize", prompt=TEXT, return_token_strs=True, model=None)).json()
    assert answer["tokens"] == tokenizer.encode(TEXT, add_special_tokens=True)
    assert answer["token_strs"] == tokenizer.token_strs(answer["tokens"])
    assert len(answer["token_strs"]) == answer["count"] and all(answer["token_strs"])
    assert (await post(served, "/detokenize", tokens=[2, *answer["tokens"]])).json()["prompt"].endswith(TEXT)
    assert tokenizer.decode([2], skip_special_tokens=False) in (await post(served, "/detokenize", tokens=[2])).text


async def test_messages_go_through_the_chat_template(served: Served, tokenizer: Tokenizer) -> None:
    plain = [{"role": "user", "content": "Hello"}]
    for prompted in (True, False):
        text = tokenizer.render(Conversation(messages=plain, add_generation_prompt=prompted))
        answer = (await post(served, "/tokenize", messages=MESSAGES, add_generation_prompt=prompted)).json()
        assert answer["tokens"] == tokenizer.encode(text, add_special_tokens=False)
    default = (await post(served, "/tokenize", messages=MESSAGES, tools=[], continue_final_message=False)).json()
    assert default["tokens"] == tokenizer.encode(
        tokenizer.render(Conversation(messages=plain)), add_special_tokens=False
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    with_tools = (await post(served, "/tokenize", messages=MESSAGES, tools=tools)).json()
    text = tokenizer.render(Conversation(messages=plain, tools=tools))
    assert with_tools["tokens"] == tokenizer.encode(text, add_special_tokens=False)


async def test_a_long_prompt_is_no_error_and_an_empty_one_neither(served: Served, tokenizer: Tokenizer) -> None:
    text = "fox " * 20_000
    answer = (await post(served, "/tokenize", prompt=text)).json()
    assert answer["tokens"] == tokenizer.encode(text, add_special_tokens=True)
    assert answer["count"] > answer["max_model_len"]
    assert (await post(served, "/tokenize", prompt="", add_special_tokens=False)).json()["tokens"] == []
    assert (await post(served, "/detokenize", tokens=[])).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "no"}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, 400, "add_generation_prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
        ("/tokenize", {"messages": MESSAGES, "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"prompt": "a", "model": "nope"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, "a"]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [1, 2048]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
    ],
)
async def test_what_is_wrong_is_named(served: Served, path: str, body: dict[str, Any], status: int, param: str) -> None:
    answer = await post(served, path, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


async def test_pools_without_a_tokenizer_and_pools_without_embeddings_say_so(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    from pipeline.builtin import model_place

    settings = (f"pools.{POOL}.tokenizer=none", f"pools.{POOL}.model={model_place(POOL)}")
    other = ("pools.other.model=baton-tiny", "pools.other.engine=torch")
    async with serving(default_redis_server, tmp_path, *settings, *other, stages="") as served:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            refused = await post(served, path, model=POOL, **body)
            assert refused.status_code == 400 and "without a tokenizer" in refused.json()["error"]["message"]
            unnamed = await post(served, path, **body)
            assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "model")
        of_mock = (await post(served, "/v1/embeddings", model=POOL, input=[1])).json()["error"]
        assert of_mock["message"] == f"model '{POOL}' makes no embeddings: its engine, mock, does not serve them"
        not_asked = (await post(served, "/v1/embeddings", model="other", input="a")).json()["error"]
        assert not_asked["message"] == "model 'other' makes no embeddings: pools.other.embeddings is false"
        assert {of_mock["code"], not_asked["code"]} == {"unsupported_parameter"}
