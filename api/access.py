"""Whose a request is: the API key that created it may read, resume and cancel it; without keys every caller is the same one."""

from __future__ import annotations

import dataclasses

from fastapi import Request as HttpRequest

from api.edge import REQUEST_ID
from api.guard import caller
from api.service import Service
from pipeline.api_keys import ADMIN
from pipeline.errors import RequestNotFound
from pipeline.ids import bare_id, pool_of
from pipeline.pools import ServedPool
from pipeline.protocol import Request
from pipeline.queue import Standing


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A request that the caller may see."""

    pool: ServedPool
    request: Request
    standing: Standing


def caller_of(http: HttpRequest) -> str:
    """The id of the caller's API key, as `Request.owner` holds it; empty where none is needed."""
    return caller(http).owner


def may_access(request: Request, owner: str) -> bool:
    """Whether a caller may read, resume and cancel this request."""
    return request.owner == owner


async def find_request(service: Service, http: HttpRequest, request_id: str, *, for_admin: bool = False) -> Found:
    """The request of an id, as it is or as it stands in an answer. `for_admin`: who has that scope may do it to those of others, too.

    Raises RequestNotFound, also for those of others: who may not see it learns nothing of it."""
    request_id = bare_id(request_id, service.pools)
    pool = service.pools.get(pool_of(request_id))
    standing = await pool.client.find(request_id) if pool is not None else None
    who = caller(http)
    may_all = for_admin and who.has_one_of((ADMIN,))
    if (
        pool is None
        or standing is None
        or standing.request is None
        or not (may_all or may_access(standing.request, who.owner))
    ):
        raise RequestNotFound(request_id)
    http.scope[REQUEST_ID] = request_id
    return Found(pool, standing.request, standing)
