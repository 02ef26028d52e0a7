"""A blocking client of Redis, for a library that wants one (rq). Everything of Baton's own speaks through `connection.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel

from pipeline.config import RedisSettings
from pipeline.errors import ConfigError, RedisUnavailable
from pipeline.sentinel_url import is_sentinel_url, parse_sentinel_url

RETRIES = 3  # of a command whose connection was lost; each waits longer, at most a second. One that is not answered in time is not repeated


def blocking_client(settings: RedisSettings) -> redis.Redis:
    """A client that makes connections when they are needed. Raises ConfigError for a wrong address."""
    limits = {
        "socket_connect_timeout": settings.timeout_s,
        "retry": Retry(ExponentialBackoff(cap=1.0, base=0.1), RETRIES, (redis.ConnectionError,)),
    }
    if is_sentinel_url(settings.url):
        url = parse_sentinel_url(settings.url)
        own = {"username": url.sentinel_username, "password": url.sentinel_password, "ssl": url.is_tls}
        sentinel = Sentinel(list(url.sentinels), sentinel_kwargs={**own, "socket_timeout": settings.timeout_s})  # type: ignore[no-untyped-call]
        found: redis.Redis = sentinel.master_for(  # type: ignore[no-untyped-call]
            url.master, db=url.db, username=url.username, password=url.password, ssl=url.is_tls, **limits
        )
        return found
    try:
        return redis.Redis.from_url(settings.url, **limits)
    except ValueError:  # its text may hold a part of the password
        raise ConfigError(
            "rq.url: expected redis://host:6379/0, rediss://host:6379/0 or unix:///path/redis.sock"
        ) from None


def is_cluster(client: redis.Redis) -> bool:
    """Whether keys lie on several nodes. Raises RedisUnavailable."""
    with answering():
        return bool(client.info("cluster").get("cluster_enabled"))


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """What a Redis raises that does not answer, or refuses, in Baton's words."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise RedisUnavailable(f"the Redis of rq does not answer: {error}") from error
