"""The API keys as this process knows them: all of them, in memory, read again when something has changed.

A request costs no question to Redis: a table is asked, and a background task looks each `api.keys_refresh_s` whether it is still what
Redis has, and the file of keys what it was. Who shows a key that the table lacks waits until it has looked again, each LOOK_AGAIN_S at
most: a new key works, and a flood of made-up ones costs Redis next to nothing. While Redis is away the keys that are known go on working
for KNOWN_FOR_S; after that nobody can say whether one was revoked, and requests are a 503.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

import structlog

from pipeline.api_keys import ApiKey, AuthMode, check_exposure, digest_of, is_same, needs_key
from pipeline.errors import InvalidKey, RedisUnavailable
from pipeline.key_store import KeysFile, KeyStore, KeyTable

LOOK_AGAIN_S = 0.2
KNOWN_FOR_S = 300.0
LONGEST_SECRET = 512  # characters; none of ours is longer

log = structlog.get_logger("baton.api")


class KeyRing:
    """See the module's docstring. `file`: the keys of `api.keys_file`, which hold with and without Redis."""

    def __init__(
        self, store: KeyStore, file: KeysFile, *, mode: AuthMode, host: str, refresh_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._store = store
        self._file = file
        self._mode = mode
        self._host = host
        self._refresh_s = refresh_s
        self._clock = clock
        self._table = KeyTable({}, None)
        self._read_s = -math.inf  # when the table was what Redis had
        self._asked_s = -math.inf
        self._looking = asyncio.Lock()
        self._is_away = False  # Redis, when it was last asked
        self._has_keys = bool(file.keys)  # stays so: keys that are lost must not open a server that needed them

    async def load(self) -> None:
        """Read the keys, before the server listens. Raises ConfigError where it would listen for others without any, RedisUnavailable."""
        if self._mode == "off":
            return
        await self.look()
        check_exposure(self._mode, self._host, has_keys=self._has_keys)

    async def run(self) -> None:
        """Keep the table fresh, for ever."""
        while self._mode != "off":
            await asyncio.sleep(self._refresh_s)
            try:
                await self.look()
            except RedisUnavailable as error:
                log.debug("API keys could not be read again", error=str(error))  # that Redis is away others say
            except Exception:  # a mistake of ours: without this task revoked keys would live on
                log.exception("API keys could not be read again, trying again")

    async def look(self) -> None:
        """Read the keys if something has changed. Raises RedisUnavailable, with those of the file read."""
        self._file.look()
        self._has_keys = self._has_keys or bool(self._file.keys)
        self._asked_s = started_s = self._clock()
        try:
            if self._read_s == -math.inf or await self._store.version() != self._table.version:
                self._table = await self._store.read()
        except RedisUnavailable:
            self._is_away = True
            raise
        self._has_keys = self._has_keys or bool(self._table.keys)
        self._read_s, self._is_away = started_s, False

    async def _look_again(self) -> None:
        """As `look`, for a key that the table lacks: one look for all who came before it, and none within LOOK_AGAIN_S of the last."""
        came_s = self._clock()
        async with self._looking:
            if self._asked_s <= came_s and not self._is_away:
                await asyncio.sleep(self._asked_s + LOOK_AGAIN_S - came_s)
                await self.look()

    @property
    def needs_key(self) -> bool:
        """Whether a request without a valid key is refused."""
        return needs_key(self._mode, self._host, has_keys=self._has_keys)

    async def key_of(self, secret: str | None) -> ApiKey:
        """The valid key that a caller shows. Raises InvalidKey, RedisUnavailable."""
        if not secret or len(secret) > LONGEST_SECRET:
            raise InvalidKey("an API key is needed: send it as `Authorization: Bearer <key>` or `x-api-key: <key>`")
        digest = digest_of(secret)
        key = self._find(digest)
        if key is None and not self._is_away:
            await self._look_again()
            key = self._find(digest)
        if self._is_unsure_of(key):
            raise RedisUnavailable("API keys cannot be checked: Redis does not answer")
        if key is None or not is_same(key.digest, digest) or not key.is_valid(time.time()):
            raise InvalidKey("the API key is not valid")
        return key

    def _is_unsure_of(self, key: ApiKey | None) -> bool:
        """Redis is away, and may know of this key, or of its end, by now."""
        if key is None:
            return self._is_away
        return key.digest not in self._file.keys and self._clock() - self._read_s > KNOWN_FOR_S

    def _find(self, digest: str) -> ApiKey | None:
        """A digest of 256 random bits as the key of a table: how long the look takes tells nothing of the keys that are in it."""
        return self._file.keys.get(digest) or self._table.keys.get(digest)
