"""The output of a response, item by item: messages, reasoning and calls in the order in which they come, and the events that tell of them.

    response.output_item.added
      response.content_part.added                       of a message or of reasoning
        response.output_text.delta, ..., .done          or response.reasoning_text.delta, ..., .done
      response.content_part.done
      response.function_call_arguments.delta, ..., .done   of a call, which has no content
    response.output_item.done

One item is open at a time. Ids follow from the request's id and the item's place, so every reader sees the same ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.parsing import Part, PartKind
from pipeline.protocol import Request
from pipeline.surface.logprobs import LEAST
from pipeline.surface.said import call_id

IN_PROGRESS, COMPLETED, INCOMPLETE = "in_progress", "completed", "incomplete"

Event = tuple[str, dict[str, Any]]  # its name, and its fields but type and sequence number
Entry = dict[str, Any]  # a token with its log probability, as chats show it


def item_id(request_id: str, prefix: str, place: int) -> str:
    """The id of an item. `prefix` as OpenAI has them: `msg`, `rs`, `fc`, `fco`."""
    digest = hashlib.blake2b(f"{request_id}\0{prefix}\0{place}".encode(), digest_size=16)
    return f"{prefix}_{digest.hexdigest()}"


@dataclasses.dataclass(slots=True)
class Item:
    """One item while it grows. `kind`: content, reasoning or a call."""

    kind: PartKind
    id: str
    place: int
    name: str = ""
    call_id: str = ""
    texts: list[str] = dataclasses.field(default_factory=list)
    entries: list[Entry] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.texts)

    def as_opened(self) -> dict[str, Any]:
        """As it is told first."""
        shown = self.shown(IN_PROGRESS)
        return shown if self.kind is PartKind.CALL else {**shown, "content": []}

    def shown(self, status: str) -> dict[str, Any]:
        """As it is now."""
        if self.kind is PartKind.CALL:
            named = {"call_id": self.call_id, "name": self.name, "arguments": self.text}
            return {"id": self.id, "type": "function_call", "status": status, **named}
        if self.kind is PartKind.REASONING:
            return {"id": self.id, "type": "reasoning", "summary": [], "content": [self.part()], "status": status}
        message = {"id": self.id, "type": "message", "role": "assistant", "status": status}
        return {**message, "content": [self.part()]}

    def part(self) -> dict[str, Any]:
        """Its only part of content."""
        if self.kind is PartKind.REASONING:
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.entries}


class Items:
    """See the module's docstring. `has_any`: whether an item was opened."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._done: list[dict[str, Any]] = []
        self._open: Item | None = None

    @property
    def has_any(self) -> bool:
        """Whether an item has been opened."""
        return bool(self._done or self._open)

    @property
    def is_in_call(self) -> bool:
        """Whether the item that is open is a call."""
        return self._open is not None and self._open.kind is PartKind.CALL

    def output(self, status: str) -> list[dict[str, Any]]:
        """All items; the one that is open has `status`."""
        return self._done if self._open is None else [*self._done, self._open.shown(status)]

    def add(self, part: Part, entries: Sequence[Entry]) -> Iterator[Event]:
        """A piece of the answer; `entries`: log probabilities of the tokens of a piece of content."""
        match part.kind:
            case PartKind.CALL:
                yield from self.close(COMPLETED)
                yield from self._begin(PartKind.CALL, part.text, call_id(self._request, 0, part.call))
            case PartKind.ARGUMENTS:
                yield from self._delta("response.function_call_arguments.delta", part.text)
            case kind if part.text:
                if self._open is None or self._open.kind is not kind:
                    yield from self.close(COMPLETED)
                    yield from self._begin(kind)
                    entries = _last_of(entries, len(part.text.encode()))
                yield from self._text(kind, part.text, entries)

    def add_plain(self, text: str) -> int | None:
        """A piece of text for the message that is open, whose only event is its delta; gives the message's place. None where no message is
        open: nothing is added then."""
        if self._open is None or self._open.kind is not PartKind.CONTENT:
            return None
        self._open.texts.append(text)
        return self._open.place

    def add_nothing(self) -> Iterator[Event]:
        """A message without text: what an answer that says nothing consists of."""
        yield from self._begin(PartKind.CONTENT)

    def close(self, status: str) -> Iterator[Event]:
        """The open item is over; without one nothing happens."""
        item, self._open = self._open, None
        if item is None:
            return
        self._done.append(item.shown(status))
        at, text = _place(item), item.text
        if item.kind is PartKind.CALL:
            yield "response.function_call_arguments.done", {**at, "name": item.name, "arguments": text}
        else:
            content = {**at, "content_index": 0}
            if item.kind is PartKind.REASONING:
                yield "response.reasoning_text.done", {**content, "text": text}
            else:
                told = [_short(entry) for entry in item.entries]
                yield "response.output_text.done", {**content, "text": text, "logprobs": told}
            yield "response.content_part.done", {**content, "part": item.part()}
        yield "response.output_item.done", {"output_index": item.place, "item": item.shown(status)}

    def _begin(self, kind: PartKind, name: str = "", call: str = "") -> Iterator[Event]:
        place, prefix = len(self._done), {PartKind.CALL: "fc", PartKind.REASONING: "rs"}.get(kind, "msg")
        item = self._open = Item(kind, item_id(self._request.id, prefix, place), place, name, call)
        yield "response.output_item.added", {"output_index": place, "item": item.as_opened()}
        if kind is not PartKind.CALL:
            yield "response.content_part.added", {**_place(item), "content_index": 0, "part": item.part()}

    def _text(self, kind: PartKind, text: str, entries: Sequence[Entry]) -> Iterator[Event]:
        if kind is PartKind.REASONING:
            yield from self._delta("response.reasoning_text.delta", text, content_index=0)
            return
        assert self._open is not None
        known = [_known(entry) for entry in entries]
        self._open.entries += known
        told = [_short(entry) for entry in known]
        yield from self._delta("response.output_text.delta", text, content_index=0, logprobs=told)

    def _delta(self, name: str, text: str, **more: Any) -> Iterator[Event]:
        assert self._open is not None
        self._open.texts.append(text)
        yield name, {**_place(self._open), **more, "delta": text}


def _place(item: Item) -> dict[str, Any]:
    return {"item_id": item.id, "output_index": item.place}


def _last_of(entries: Sequence[Entry], size: int) -> Sequence[Entry]:
    """Those of the last `size` bytes: what stands before the first text of an item is what parts it from the item before."""
    first = len(entries)
    while first > 0 and size > 0:
        first -= 1
        size -= len(entries[first]["bytes"])
    return entries[first:]


def _known(entry: Entry) -> Entry:
    """The types have no null for what Redis lost."""
    return entry if entry["logprob"] is not None else {**entry, "logprob": LEAST}


def _short(entry: Entry) -> Entry:
    """An entry as events have it: without the bytes."""
    top = [{"token": one["token"], "logprob": one["logprob"]} for one in entry["top_logprobs"]]
    return {"token": entry["token"], "logprob": entry["logprob"], "top_logprobs": top}
