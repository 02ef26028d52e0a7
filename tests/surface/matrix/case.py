"""A request of the matrix, and what came of it in one form for all routes."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

THINKER = "thinker"  # the built-in model with a response template that knows reasoning
KEYS = {
    name: f"baton-sk-{name}" for name in ("all", "other-models", "one-request", "few-tokens")
}  # what they may do is in `test_matrix`
AT_ONCE = 12  # requests


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One request. `id`: route, what it asks for, how. `{id}` in path and body is the id in the answer of the case `after`, which must have
    come before. `check`: what must hold of every answer of its route; `more`: of this one. `like`: the case that must say the same."""

    id: str
    path: str
    check: Callable[[Answer], None]
    more: Callable[[Answer], object] | None = None
    body: Mapping[str, Any] | bytes | None = None
    form: Mapping[str, str | bytes] | None = None  # of an upload: bytes are a file
    method: str = "POST"
    params: Mapping[str, str] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    key: str | None = "all"
    status: int = 200
    after: str = ""
    like: str = ""

    @property
    def asked(self) -> dict[str, Any]:
        """The body's fields."""
        if self.form is not None:
            return dict(self.form)
        return dict(self.body) if isinstance(self.body, Mapping) else {}


@dataclasses.dataclass
class Said:
    """One choice: text, thoughts, calls as (name, arguments), why it ended, and what was told of its tokens."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = dataclasses.field(default_factory=list)
    finish: str | None = None
    tokens: list[dict[str, Any]] = dataclasses.field(
        default_factory=list
    )  # of log probabilities: token, bytes or None, top
    has_logprobs: bool = False
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None

    def same(self) -> tuple[object, ...]:
        """What must not depend on how an answer was read."""
        tokens = [(one["token"], list(one["top"])) for one in self.tokens]
        return self.text, self.reasoning, self.calls, self.finish, tokens, self.token_ids, self.prompt_token_ids


@dataclasses.dataclass
class Answer:
    """What came of a case. `others`: the answers of the matrix by the ids of their cases."""

    case: Case
    status: int
    headers: httpx.Headers
    content: bytes
    others: Mapping[str, Answer]
    said: list[Said] = dataclasses.field(default_factory=list)  # filled in by the check of its route
    usage: dict[str, Any] | None = None
    num_events: int = 0

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @functools.cached_property
    def json(self) -> Any:
        return json.loads(self.content)

    @functools.cached_property
    def id(self) -> str:
        """The one in the body, or in the first event that has one."""
        if not self.is_stream:
            return str(self.json["id"])
        first = json.loads(next(line for line in self.content.split(b"\n") if line.startswith(b"data: "))[6:])
        return str((first.get("response") or first.get("message") or first)["id"])

    @property
    def before(self) -> Answer:
        return self.others[self.case.after]


class Asking:
    """Sends cases, several at once, each behind the one that it comes after."""

    def __init__(self, http: httpx.AsyncClient, cases: Sequence[Case]) -> None:
        self._http = http
        self._cases = {case.id: case for case in cases}
        assert len(self._cases) == len(cases), "ids are unique"
        self._limit = asyncio.Semaphore(AT_ONCE)
        self._tasks: dict[str, asyncio.Task[Answer]] = {}
        self.answers: dict[str, Answer] = {}

    async def all(self) -> dict[str, Answer]:
        for case_id, case in self._cases.items():
            self._tasks[case_id] = asyncio.create_task(self._one(case))
        await asyncio.gather(*self._tasks.values())
        return self.answers

    async def _one(self, case: Case) -> Answer:
        before = await self._tasks[case.after] if case.after else None
        async with self._limit:
            answer = await self._ask(case, before)
        self.answers[case.id] = answer
        return answer

    async def _ask(self, case: Case, before: Answer | None) -> Answer:
        def filled(text: str) -> str:
            return text.replace("{id}", before.id) if before is not None and "{id}" in text else text

        body = (
            case.body if isinstance(case.body, bytes) or case.body is None else filled(json.dumps(case.body)).encode()
        )
        is_json = case.method == "POST" and case.form is None
        headers = {"content-type": "application/json"} if is_json else {}
        if case.key is not None:
            headers["authorization"] = f"Bearer {KEYS.get(case.key, case.key)}"
        response = await self._http.request(
            case.method,
            filled(case.path),
            params=dict(case.params),
            headers=headers | dict(case.headers),
            **_sent(case, body),
        )
        return Answer(case, response.status_code, response.headers, response.content, self.answers)


def _sent(case: Case, body: bytes | None) -> dict[str, Any]:
    if case.form is None:
        return {"content": body}
    fields = {name: value for name, value in case.form.items() if isinstance(value, str)}
    files = {name: ("a.jsonl", value) for name, value in case.form.items() if isinstance(value, bytes)}
    return {"data": fields, "files": files}


def both(
    route: str, path: str, rows: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any], check: Callable[[Answer], None],
    more: Mapping[str, Callable[[Answer], object]],
) -> list[Case]:  # fmt: skip
    """Each row whole and streamed; both must say the same. A row that says `stream` itself comes once."""
    cases: list[Case] = []
    for name, fields in rows.items():
        for way, stream in (("whole", None), ("stream", True)):
            if "stream" in fields and bool(fields["stream"]) != bool(stream):
                continue
            body = {**base, **({"stream": True} if stream else {}), **fields}
            like = f"{route}/{name}/whole" if stream and "stream" not in fields else ""
            cases.append(
                Case(id=f"{route}/{name}/{way}", path=path, body=body, check=check, more=more.get(name), like=like)
            )
    return cases


def events_of(answer: Answer, end: bytes = b"data: [DONE]\n\n") -> list[dict[str, Any]]:
    """The events of a stream of chats or completions; its bytes must be nothing else."""
    assert answer.content.endswith(end), answer.content[-300:]
    events = []
    for block in answer.content.removesuffix(end).split(b"\n\n")[:-1]:
        (line,) = [line for line in block.split(b"\n") if line not in (b": ping", b"")]
        events.append(json.loads(line.removeprefix(b"data: ")))
    answer.num_events = len(events)
    return events
