"""Requests and tokens a minute of an API key, counted in Redis by the `limits` library, for all replicas together.

The library's sliding window: two counters a limit, of this minute and the last one, which counts by the share of it that lies within the
last sixty seconds. One script takes or refuses, by Redis's clock; over our own connections, so through Sentinels and unix sockets, too.

Tokens are counted as OpenAI does: the prompt's and all that the answer may have (`max_tokens` of each choice), at admission, and nothing
is given back. So what a key may take is known before any work, a client that leaves before the end pays what one that stays does, and a
process that dies loses no count. A request counts when it comes, whatever becomes of it.
"""

from __future__ import annotations

import dataclasses
import math

from fastapi import Request as HttpRequest
from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage

from api.edge import MORE_HEADERS
from api.guard import caller
from pipeline.api_keys import ApiKey
from pipeline.connection import Connection
from pipeline.errors import RateLimited
from pipeline.keys import RATES_ROOT
from pipeline.protocol import BackendInput

WINDOW_S = 60.0
HEADER_NAMES = tuple(
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
)


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """A limit and what counts against it: the last minute's counter and this one's, and the seconds that each still lives: this
    minute's up to two minutes, the second of which it is the last minute's."""

    limit: int
    before: int = 0
    before_s: float = 0.0
    now: int = 0
    now_s: float = 0.0

    @property
    def remaining(self) -> int:
        """How much may be taken now."""
        return max(0, self.limit - math.floor(self.before * self.before_s / WINDOW_S) - self.now)

    @property
    def reset_s(self) -> float:
        """Until nothing counts any more, if nothing comes."""
        return self.now_s if self.now else self.before_s if self.before else 0.0

    def wait_s(self, cost: int) -> float:
        """Until `cost` fits, if nothing else comes; infinite for what never does."""
        if cost > self.limit:
            return math.inf
        if cost <= self.remaining:
            return 0.0
        turn_s = max(0.0, self.now_s - WINDOW_S) if self.now else 0.0  # when this minute is the last one
        room = self.limit - cost - self.now
        if self.before and room >= 0:
            fits_s = self.before_s - (room + 1) * WINDOW_S / self.before
            if not self.now or fits_s < turn_s:
                return max(0.0, fits_s)
        return max(turn_s, self.now_s - (self.limit - cost + 1) * WINDOW_S / self.now)


class RateLimits:
    """The limits of all keys."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._storage = RedisStorage(
            "async+redis://", implementation="redispy", key_prefix=RATES_ROOT,
            connection_pool=connection.pool,
        )  # fmt: skip

    async def count_request(self, http: HttpRequest) -> None:
        """One request of the caller, before anything is done for it. Its answer tells how much is left, whatever it is.

        Raises RateLimited, RedisUnavailable.
        """
        key = caller(http).key
        if key is not None and key.requests_per_minute:
            await self._take(http, key, "requests", key.requests_per_minute, 1)

    async def count_tokens(self, http: HttpRequest, tokens: int) -> None:
        """The most tokens that a request may take (`most_tokens`). Raises RateLimited, RedisUnavailable."""
        key = caller(http).key
        if key is not None and key.tokens_per_minute:
            await self._take(http, key, "tokens", key.tokens_per_minute, tokens)

    async def _take(self, http: HttpRequest, key: ApiKey, of: str, limit: int, cost: int) -> None:
        item = RateLimitItemPerMinute(limit)
        name = item.key_for(key.id, of)

        async def take() -> tuple[bool, tuple[int, float, int, float]]:
            is_taken = await self._storage.acquire_sliding_window_entry(name, limit, item.get_expiry(), cost)
            return is_taken, await self._storage.get_sliding_window(name, item.get_expiry())

        is_taken, (before, before_s, now, now_s) = await self._connection.lent("a rate limit", take)
        window = Window(limit, before, before_s, now, now_s)
        http.scope.setdefault(MORE_HEADERS, {}).update(headers_of(window, of))
        if not is_taken:
            raise refusal(window, of, cost)


def most_tokens(ready: BackendInput) -> int:
    """Of the prompt and of all answers."""
    return len(ready.token_ids) + ready.sampling_options.n * (ready.stop_conditions.max_tokens or 0)


def headers_of(window: Window, of: str) -> dict[str, str]:
    """As OpenAI tells them."""
    return {
        f"x-ratelimit-limit-{of}": str(window.limit),
        f"x-ratelimit-remaining-{of}": str(window.remaining),
        f"x-ratelimit-reset-{of}": f"{window.reset_s:.3f}s",
    }


def refusal(window: Window, of: str, cost: int) -> RateLimited:
    """Why, and when to come again."""
    wait_s = window.wait_s(cost)
    if math.isinf(wait_s):
        return RateLimited(
            f"this request may take {cost} {of}, prompt and max_tokens together, and the API key has {window.limit} a minute: "
            "it never fits; send a shorter one",
            retry_after_s=WINDOW_S, never_fits=True,
        )  # fmt: skip
    needed = f", {cost} are needed" if cost > 1 else ""
    return RateLimited(
        f"the API key has {window.limit} {of} a minute, of which {window.remaining} are left{needed}: "
        f"try again in {max(wait_s, 0.001):.3g} s",
        retry_after_s=wait_s,
    )
