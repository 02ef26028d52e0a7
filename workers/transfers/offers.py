"""How a handle says by which ways its blocks can be fetched.

    transfer  params
    "shm"     {"arena": ..., "first": ..., "count": ..., "generation": ...}                one way, as ever
    "tcp"     {"host": ..., "port": ..., "key": ..., "generation": ...}                    one way
    "nixl"    {"agent": ..., "metadata": ..., "arena": ..., "base": ..., ...}              one way
    "auto"    {"offers": [{"way": "shm", "params": {...}}, {"way": "tcp", "params": ...}]} several, best first

A worker from before there were offers knows no transfer "auto": it refuses the handle with a `WireError` and recomputes.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from pipeline.errors import WireError
from pipeline.protocol import KVHandle

AUTO = "auto"
MAX_OFFERS = 8


class Offer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way. A reader passes over one that it does not know: it is of a newer owner."""

    way: str
    params: dict[str, Any]


class Offers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`params` of an "auto" handle; best first."""

    offers: Annotated[list[Offer], msgspec.Meta(min_length=1, max_length=MAX_OFFERS)]


def written(kind: str, offers: list[Offer]) -> tuple[str, dict[str, Any]]:
    """`transfer` and `params` of a handle. `kind`: `transfer.kind` of the owner; one that is not "auto" has one offer."""
    if kind == AUTO:
        return AUTO, msgspec.to_builtins(Offers(offers=offers))
    (offer,) = offers
    return offer.way, offer.params


def read(handle: KVHandle, known: tuple[str, ...]) -> list[Offer]:
    """The offers of a handle, best first. Raises `WireError` where it is not one of these ways."""
    if handle.transfer in known:
        return [Offer(way=handle.transfer, params=handle.params)]
    if handle.transfer != AUTO:
        raise WireError(
            f"handle {handle.id} is for transfer {handle.transfer!r}, known are {', '.join((AUTO, *known))}"
        )
    try:
        return msgspec.convert(handle.params, Offers).offers
    except msgspec.ValidationError as error:
        raise WireError(f"handle {handle.id}: params: {error}") from error
