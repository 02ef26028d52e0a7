"""What the prefix caches of a pool's workers hold, as it changes: for a router that sends a prompt where most of it is.

Workers add to one stream of the pool, `{pool}:kv`. An entry is a `KVEvents`: some events of one worker in their order, with the number
of the first. A worker that starts, and one whose engine was started anew, begins with `BlocksCleared`. A reader begins at the oldest entry
that there is; where a worker's numbers do not follow one another (the stream was cut, Redis was away for long) it forgets what it knows of
that worker, and it forgets workers that leave. What it knows is a guess all the same: a wrong one costs a prompt that is computed.
"""

from __future__ import annotations

import msgspec

from pipeline.protocol import UNREADABLE

FIELD = "e"  # of an entry
MOST_ENTRIES = 10_000  # of the stream, about


class BlocksStored(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """Full blocks that follow one another can be found from now on.

    `hashes`: one a block, a number for its tokens and all before them; equal in all engines of one kind, version and setting. `parent`:
    that of the block before them, None where they begin a prompt. `tokens`: of all of them, packed as a token log. `lora_name`, `salt`:
    what keeps them apart from others with equal tokens; a salt is told with the block that begins a prompt.
    """

    hashes: list[int]
    parent: int | None
    tokens: bytes
    block_size: int
    lora_name: str = ""
    salt: str = ""


class BlocksRemoved(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """Blocks that cannot be found any more."""

    hashes: list[int]


class BlocksCleared(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """Nothing is there any more."""


KVEvent = BlocksStored | BlocksRemoved | BlocksCleared


class KVEvents(msgspec.Struct, frozen=True, array_like=True, tag="kv_events.v1"):
    """An entry of the stream. `number`: of the first event, counted from 0 since the worker began."""

    worker: str
    number: int
    events: list[KVEvent]


encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(KVEvents).decode


def decode(data: bytes) -> KVEvents | None:
    """What an entry says; None for one that this version cannot read: to its reader it is a gap."""
    try:
        return _decode(data)
    except UNREADABLE:
        return None
