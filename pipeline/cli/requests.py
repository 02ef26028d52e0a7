"""What an operator asks Redis itself, with or without workers: lanes, one request, revoke, purge."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

import msgspec
import typer

from pipeline.cli.options import Given
from pipeline.cli.pools import Place, connected
from pipeline.cli.replies import as_json, as_text
from pipeline.control import Answer
from pipeline.errors import UNKNOWN_ID, ConfigError
from pipeline.exits import Exit
from pipeline.ids import pool_of
from pipeline.inspection import LaneState, as_dict, lane_states, task_state
from pipeline.keys import PoolKeys
from pipeline.queue import LANES, PoolQueue
from pipeline.snapshot import stages_of
from pipeline.wording import counted


async def show_lanes(source: Given, pool: str | None, workers: Sequence[str], *, in_json: bool) -> Exit:
    """What waits, lane by lane."""
    async with connected(source, pool) as place:
        states = {
            name: await lane_states(place.connection, PoolKeys(name), [w.removesuffix(f"@{name}") for w in workers])
            for name in place.pools
        }
    if in_json:
        print(json.dumps(msgspec.to_builtins(states)))
        return Exit.OK
    for name, lanes in states.items():
        print(f"->  {name}: OK")
        print("\n".join(_table(lanes)))
    return Exit.OK


def _table(lanes: list[LaneState]) -> list[str]:
    width = max([4, *(len(lane.lane) for lane in lanes)])
    stages = max([8, *(len(lane.stage) for lane in lanes)])
    rows = [f"    {'stage':<{stages}} {'lane':<{width}} {'waiting':>8} {'prompt tokens':>14} {'oldest':>10}"]
    for lane in lanes:
        oldest = "-" if lane.oldest_s is None else f"{lane.oldest_s:.1f} s"
        rows.append(
            f"    {lane.stage:<{stages}} {lane.lane:<{width}} {lane.waiting:>8} {lane.prompt_tokens:>14} {oldest:>10}"
        )
    return rows


async def query_tasks(source: Given, ids: Sequence[str], *, in_json: bool) -> Exit:
    """Where each request stands."""
    async with connected(source, None) as place:
        answers = {request_id: await _query(place, request_id) for request_id in place.bare(ids)}
    return _show(answers, in_json=in_json)


async def _query(place: Place, request_id: str) -> Answer:
    state = await task_state(place.connection, request_id) if pool_of(request_id) else None
    return Answer(request_id, as_dict(state)) if state else Answer(request_id, error=UNKNOWN_ID)


async def revoke(source: Given, ids: Sequence[str], *, in_json: bool) -> Exit:
    """End requests wherever they are. It is written into the request: no worker has to be there, none can forget it."""
    async with connected(source, None) as place:
        answers = {request_id: await _revoke(place, request_id) for request_id in place.bare(ids)}
    return _show(answers, in_json=in_json)


async def _revoke(place: Place, request_id: str) -> Answer:
    if not pool_of(request_id):
        return Answer(request_id, error=UNKNOWN_ID)
    state, reason = await PoolQueue(place.connection, pool_of(request_id)).cancel(request_id, "revoked")
    if state == "gone":
        return Answer(request_id, error=UNKNOWN_ID)
    if (state, reason) == ("cancelled", "revoked"):
        return Answer(request_id, "revoked")
    return Answer(request_id, f"had ended before: {state}{f' ({reason})' if reason else ''}")


def _show(answers: dict[str, Answer], *, in_json: bool) -> Exit:
    print(as_json(answers) if in_json else as_text(answers))
    return Exit.FAILED if any(answer.error for answer in answers.values()) else Exit.OK


async def purge(
    source: Given, pool: str | None, stage: str | None, lane: str | None, *, force: bool, in_json: bool
) -> Exit:
    """End what waits now on the chosen lanes; asks first unless `force`. What comes later stays."""
    if lane is not None and lane not in LANES and not lane.startswith("@"):
        raise ConfigError(f"--lane: expected {', '.join(LANES)} or @worker, not {lane}")
    async with connected(source, pool) as place:
        await _check_stage(place, stage)
        chosen = [(name, state) for name in place.pools for state in await _chosen(place, name, stage, lane)]
        waiting = sum(state.waiting for _, state in chosen)
        if not force:
            where = f"{counted(len(chosen), 'lane')} of {', '.join(place.pools)}"
            typer.echo(f"WARNING: this ends {counted(waiting, 'waiting request')} on {where} as cancelled.", err=True)
            typer.confirm("There is no way back. Are you sure?", abort=True, err=True)
        purged = [await _purge_lane(place, name, state) for name, state in chosen]
    if in_json:
        rows = [
            {"pool": name, "stage": state.stage, "lane": state.lane, "purged": count}
            for (name, state), count in zip(chosen, purged, strict=True)
        ]
        print(json.dumps(rows))
    elif sum(purged):
        print(f"Purged {counted(sum(purged), 'request')} from {counted(len(chosen), 'lane')}.")
    else:
        print(f"No requests purged from {counted(len(chosen), 'lane')}.")
    return Exit.OK


async def _check_stage(place: Place, stage: str | None) -> None:
    """Raises `ConfigError` naming the stages that there are; those of one's own are known once they had work or a worker."""
    known = {name for pool in place.pools for name in await stages_of(place.connection, PoolKeys(pool))}
    if stage is not None and stage not in known:
        raise ConfigError(f"--stage: expected one of {', '.join(sorted(known))}, not {stage}")


async def _chosen(place: Place, pool: str, stage: str | None, lane: str | None) -> list[LaneState]:
    states = await lane_states(place.connection, PoolKeys(pool))
    return [state for state in states if stage in (None, state.stage) and lane in (None, state.lane)]


async def _purge_lane(place: Place, pool: str, lane: LaneState) -> int:
    """Part by part, so that no call of a script is long."""
    queue = PoolQueue(place.connection, pool)
    seconds, micros = await place.connection.command("TIME")
    last, nonce = str(int(seconds) * 1000 + int(micros) // 1000), secrets.token_hex(8)  # what comes later stays
    total, cursor = 0, "-"
    while cursor:
        count, cursor = await queue.purge(lane.stage, lane.lane, cursor=cursor, last=last, nonce=nonce)
        total += count
    return total
