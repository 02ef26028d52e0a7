"""`baton chat`: an answer as it comes, then where its time went."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any, NamedTuple

import httpx
import msgspec
from rich.console import Console

from pipeline.cli.openai_stream import stream_chat
from pipeline.cli.options import api_headers, api_url, base_url
from pipeline.config import Settings
from pipeline.connection import Connection
from pipeline.errors import BatonError
from pipeline.exits import NoAnswer
from pipeline.ids import bare_id, pool_of
from pipeline.keys import PoolKeys
from pipeline.protocol import Timeline
from pipeline.redis_server import running_redis

Message = dict[str, str]


class Question(NamedTuple):
    """How to ask; None leaves it to the settings or the API."""

    url: str | None
    model: str | None
    max_tokens: int | None
    temperature: float | None


class Answer(NamedTuple):
    """What came back: `timeline` is None where Redis cannot be asked."""

    id: str
    text: str
    finish_reason: str | None
    completion_tokens: int
    first_token_s: float
    total_s: float
    timeline: Timeline | None


def run_chat(settings: Settings, question: Question, text: str | None, *, as_json: bool) -> None:
    """One answer to `text`, or a conversation until the end of the input."""
    if text is not None:
        _ask(settings, question, [{"role": "user", "content": text}], as_json=as_json)
        return
    messages: list[Message] = []
    while (line := _next_line()) is not None:
        messages.append({"role": "user", "content": line})
        answer = _ask(settings, question, messages, as_json=as_json)
        messages.append({"role": "assistant", "content": answer.text})


def _next_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _ask(settings: Settings, question: Question, messages: list[Message], *, as_json: bool) -> Answer:
    console = Console(highlight=False, soft_wrap=True)
    body: dict[str, Any] = {"model": question.model or next(iter(settings.pools)), "messages": messages}
    for name in ("max_tokens", "temperature"):
        if getattr(question, name) is not None:
            body[name] = getattr(question, name)
    url = base_url(question.url) if question.url else api_url(settings.api)
    answer = asyncio.run(_stream(url, settings, body, None if as_json else console))
    if as_json:
        print(json.dumps({**answer._asdict(), "timeline": _named(answer.timeline), "spans": spans(answer)}))
    else:
        console.print()
        console.print(summary(answer), style="dim")
    return answer


async def _stream(url: str, settings: Settings, body: dict[str, Any], console: Console | None) -> Answer:
    started_s = time.monotonic()
    first_s = None
    deltas = []
    async with httpx.AsyncClient(
        base_url=url, headers=api_headers(), timeout=httpx.Timeout(120.0, connect=5.0), trust_env=False
    ) as http:
        async for delta in stream_chat(http, body):
            if delta.text and first_s is None:
                first_s = time.monotonic() - started_s
            if console is not None:
                console.print(delta.text, end="", markup=False)
            deltas.append(delta)
    if not deltas:
        raise NoAnswer("the stream held nothing")
    total_s = time.monotonic() - started_s
    return Answer(
        id=deltas[0].id,
        text="".join(delta.text for delta in deltas),
        finish_reason=next((delta.finish_reason for delta in deltas if delta.finish_reason), None),
        completion_tokens=next((delta.usage["completion_tokens"] for delta in deltas if delta.usage), 0),
        first_token_s=first_s or total_s,
        total_s=total_s,
        timeline=await _timeline(settings, deltas[0].id),
    )


async def _timeline(settings: Settings, answer_id: str) -> Timeline | None:
    """The request's stamps in Redis; None when it is out of reach from here, which is no fault of the answer."""
    request_id = bare_id(answer_id, settings.pools)
    keys = PoolKeys(pool_of(request_id))
    names = [f"t_{name}" for name in Timeline.__struct_fields__]
    try:
        connection = Connection(running_redis(settings.redis))
        try:
            stamps = await connection.command("HMGET", keys.request(request_id), *names)
        finally:
            await connection.close()
    except BatonError:
        return None
    return Timeline(*(int(stamp or 0) for stamp in stamps)) if any(stamps) else None


def spans(answer: Answer) -> dict[str, float]:
    """Where the time went, in milliseconds and tokens a second, as far as it is known.

    `queue_ms` is both waits together; without remote prefill there is no transfer.
    """
    known: dict[str, float] = {}
    timeline = answer.timeline
    decode_s = answer.total_s - answer.first_token_s
    known["first_token_ms"] = answer.first_token_s * 1000
    if timeline is not None:
        waits = [(timeline.admitted, timeline.claimed_prefill), (timeline.handover, timeline.claimed_decode)]
        if not timeline.claimed_prefill:
            waits = [(timeline.admitted, timeline.claimed_decode)]
        known["queue_ms"] = sum(_between_ms(*wait) for wait in waits)
        if timeline.claimed_prefill:
            known["prefill_ms"] = _between_ms(timeline.claimed_prefill, timeline.handover)
            known["transfer_ms"] = _between_ms(timeline.claimed_decode, timeline.fetched)
        known["first_token_ms"] = _between_ms(timeline.admitted, timeline.first_token)
        decode_s = _between_ms(timeline.first_token, timeline.ended) / 1000
    if answer.completion_tokens > 1 and decode_s > 0:
        known["tokens_per_s"] = (answer.completion_tokens - 1) / decode_s
    return known


def _named(timeline: Timeline | None) -> dict[str, int] | None:
    """The stamps by name, in microseconds of Redis's clock; on the wire they are a bare array."""
    return None if timeline is None else msgspec.structs.asdict(timeline)


def summary(answer: Answer) -> str:
    """`queue 2 ms · prefill 31 ms · transfer 4 ms · first token 38 ms · 118 tok/s`, without what is not known."""
    known = spans(answer)
    words = {"queue_ms": "queue", "prefill_ms": "prefill", "transfer_ms": "transfer", "first_token_ms": "first token"}
    parts = [f"{word} {_ms(known[name])}" for name, word in words.items() if name in known]
    if "tokens_per_s" in known:
        parts.append(f"{known['tokens_per_s']:.0f} tok/s")
    return " · ".join(parts)


def _between_ms(start_us: int, end_us: int) -> float:
    """0 where one of the two did not happen."""
    return max(0, end_us - start_us) / 1000 if start_us and end_us else 0.0


def _ms(value: float) -> str:
    return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"
