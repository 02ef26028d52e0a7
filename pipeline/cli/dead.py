"""`baton dead`: the requests that no worker could do; look, try again, forget."""

from __future__ import annotations

import datetime
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import typer

from pipeline.cli.options import Given
from pipeline.cli.pools import Place, connected
from pipeline.cli.replies import as_json, as_text
from pipeline.control import Answer
from pipeline.dead import DeadLetter, DeadLetters
from pipeline.errors import UNKNOWN_ID, BatonError, ConfigError, NotFound, RedisUnavailable, WireError
from pipeline.exits import Exit
from pipeline.ids import pool_of
from pipeline.inspection import as_dict, task_state
from pipeline.wording import counted


async def list_dead(source: Given, pool: str | None, limit: int, *, in_json: bool) -> Exit:
    """The newest first."""
    async with connected(source, pool) as place:
        letters = [letter for name in place.pools for letter in await _newest(place, name, limit)]
    if in_json:
        print(json.dumps([_row(letter) for letter in letters]))
        return Exit.OK
    if not letters:
        print("- empty -")
    for letter in letters:
        where = f"{letter.stage}, {counted(letter.attempts, 'attempt')}, last by {letter.worker or 'nobody'}"
        print(f"{_time(letter)}  {letter.id}  {where}: {letter.reason}")
    return Exit.OK


async def _newest(place: Place, pool: str, limit: int) -> list[DeadLetter]:
    letters: list[DeadLetter] = []
    async for letter in DeadLetters(place.connection, pool).newest_first():
        if len(letters) == limit:
            break
        letters.append(letter)
    return letters


async def show_dead(source: Given, request_id: str, *, in_json: bool) -> Exit:
    """One dead letter: why it died, where it stood, what was asked for (without the prompt's tokens)."""
    async with connected(source, None) as place:
        (request_id,) = place.bare([request_id])
        dead = DeadLetters(place.connection, _pool(place, request_id))
        letter = await dead.find(request_id)
        state = await task_state(place.connection, request_id)
        request: dict[str, Any]
        try:
            request = msgspec.to_builtins(await dead.request(letter))
            request["input"]["token_ids"] = f"{len(request['input']['token_ids'])} tokens"
        except (NotFound, WireError) as error:
            request = {"error": str(error)}
    told = {**_row(letter), "record": as_dict(state) if state else None, "request": request}
    print(json.dumps(told, indent=None if in_json else 4))
    return Exit.OK


async def replay_dead(source: Given, pool: str | None, ids: Sequence[str], *, everything: bool, in_json: bool) -> Exit:
    """A new request for each; it names the old one."""

    async def replay(place: Place, dead: DeadLetters, letter: DeadLetter) -> Any:
        new_id = await dead.replay(letter, place.settings.queue, place.settings.router)
        return {"replayed_as": new_id} if in_json else f"replayed as {new_id}"

    return await _each(source, pool, ids, replay, everything=everything, in_json=in_json)


async def drop_dead(
    source: Given, pool: str | None, ids: Sequence[str], *, everything: bool, force: bool, in_json: bool
) -> Exit:
    """Forget each, with all that is kept of it; `--all` asks first unless `force`."""

    async def drop(_: Place, dead: DeadLetters, letter: DeadLetter) -> Any:
        await dead.drop(letter)
        return "dropped"

    _check_ids(ids, everything=everything)
    if everything and not force:
        typer.confirm("This forgets all dead letters. There is no way back. Are you sure?", abort=True, err=True)
    return await _each(source, pool, ids, drop, everything=everything, in_json=in_json)


async def _each(
    source: Given, pool: str | None, ids: Sequence[str], act: Callable[[Place, DeadLetters, DeadLetter], Awaitable[Any]], *,
    everything: bool, in_json: bool,
) -> Exit:  # fmt: skip
    """One answer an id; what fails for one does not keep the others from being tried."""
    _check_ids(ids, everything=everything)
    answers: dict[str, Answer] = {}
    async with connected(source, pool) as place:
        if everything:
            ids = [letter.id for name in place.pools for letter in await _newest(place, name, -1)]
        for request_id in place.bare(ids):
            try:
                dead = DeadLetters(place.connection, _pool(place, request_id))
                answers[request_id] = Answer(request_id, await act(place, dead, await dead.find(request_id)))
            except RedisUnavailable:
                raise
            except BatonError as error:
                answers[request_id] = Answer(request_id, error=str(error).removeprefix(f"{request_id}: "))
    print(as_json(answers) if in_json else as_text(answers) or "- empty -")
    return Exit.FAILED if any(answer.error for answer in answers.values()) else Exit.OK


def _check_ids(ids: Sequence[str], *, everything: bool) -> None:
    if bool(ids) == everything:
        raise ConfigError("which ones? give ids of `baton dead list`, or --all")


def _pool(place: Place, request_id: str) -> str:
    pool = pool_of(request_id)
    if pool not in place.settings.pools:
        raise NotFound(f"{request_id}: {UNKNOWN_ID}")
    return pool


def _row(letter: DeadLetter) -> dict[str, Any]:
    return {**msgspec.structs.asdict(letter), "time": _time(letter)}


def _time(letter: DeadLetter) -> str:
    when = datetime.datetime.fromtimestamp(letter.time_ms / 1000, datetime.UTC)
    return when.isoformat(sep=" ", timespec="seconds")
