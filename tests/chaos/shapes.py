"""What is asked for: a seeded catalogue of requests, and what each is answered when nothing disturbs it.

Every answer is a function of its request (greedy, or sampled from a seed), so whatever happens to a later request of the same
shape, its tokens must be these.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Iterable
from typing import Any

import httpx

from pipeline.client import PoolClient
from pipeline.ids import pool_of
from pipeline.protocol import Request
from pipeline.queue import PoolQueue
from tests.chaos.fleet import SHOWS_KEY
from tests.system import POOL, collect, request

QUESTIONS = ("What is Baton?", "Tell me a story about a fox.", "What is a block handle?", "What is 7 + 5?")
LONG_TOKENS = 60  # an answer of this length is in the middle of its stream when something happens
Tokens = list[list[int]]


@dataclasses.dataclass(eq=False)
class Shape:
    """One request, and its undisturbed answer. `prompt` is for token ids, `chat` for text through the chat template."""

    number: int
    prompt: list[int]
    chat: str
    n: int
    max_tokens: int
    temperature: float
    seed: int | None
    is_direct: bool  # through the Python client, else over HTTP
    tokens: Tokens = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)

    def request(self) -> Request:
        """As the Python client takes it, under a new id."""
        return request(self.prompt, n=self.n, max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed)

    @property
    def path(self) -> str:
        """The route that it takes over HTTP."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, *, stream: bool) -> dict[str, Any]:
        """As HTTP takes it."""
        what = {"messages": [{"role": "user", "content": self.chat}]} if self.chat else {"prompt": self.prompt}
        sampling = {"temperature": self.temperature, **({"seed": self.seed} if self.seed is not None else {})}
        return {"model": POOL, "n": self.n, "max_tokens": self.max_tokens, "stream": stream, **what, **sampling}


def catalogue(rng: random.Random, count: int = 32) -> list[Shape]:
    """Short and long prompts, one and several choices, greedy and sampled, short and long answers."""
    return [_shape(rng, number) for number in range(count)]


def _shape(rng: random.Random, number: int) -> Shape:
    length = rng.choice((3, 17, 40, 150, 400))
    is_sampled = rng.random() < 0.5
    is_direct = number % 2 == 0
    return Shape(
        number=number,
        prompt=[rng.randrange(3, 2000) for _ in range(length)],
        chat=rng.choice(QUESTIONS) if not is_direct and rng.random() < 0.5 else "",
        n=rng.choice((1, 1, 1, 2, 3)),
        max_tokens=rng.choice((1, 8, 24, LONG_TOKENS, LONG_TOKENS, 2 * LONG_TOKENS)),
        temperature=0.8 if is_sampled else 0.0,
        seed=rng.randrange(1, 1 << 31) if is_sampled else None,
        is_direct=is_direct,
    )


async def answer_undisturbed(shapes: Iterable[Shape], client: PoolClient, url: str) -> None:
    """Ask each once, on a system to which nothing is done, and keep the answers."""
    turns = asyncio.Semaphore(8)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, headers=SHOWS_KEY) as http:

        async def ask(shape: Shape) -> None:
            async with turns:
                if shape.is_direct:
                    shape.tokens, ended = await collect(await client.submit(shape.request()), shape.n)
                    assert ended.state == "done", ended
                else:
                    await _ask_http(shape, http, client.queue)

        await asyncio.gather(*(ask(shape) for shape in shapes))


async def _ask_http(shape: Shape, http: httpx.AsyncClient, queue: PoolQueue) -> None:
    answer = (await http.post(shape.path, json=shape.body(stream=False))).raise_for_status().json()
    shape.texts = [
        choice["message"]["content"] if shape.chat else choice["text"]
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
    ]
    standing = await queue.attach(request_id_of(answer["id"]), watch=False)
    assert standing is not None
    shape.tokens = standing.log.tokens


def request_id_of(answer_id: str) -> str:
    """The request's id in the id of an answer: `chatcmpl-<id>`, `cmpl-<id>`."""
    request_id = answer_id.partition("-")[2]
    assert pool_of(request_id) == POOL, answer_id
    return request_id
