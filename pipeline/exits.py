"""Exit codes of the command line and of its processes, for scripts that call them."""

from __future__ import annotations

import enum

from pipeline.errors import BatonError, ConfigError, RedisUnavailable
from pipeline.redis_server import RedisServerError
from pipeline.scaling.lease import PoolTaken


class Exit(enum.IntEnum):
    """What a code means; the numbers are part of the interface."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNAVAILABLE_HERE = 3
    NO_ANSWER = 4
    NO_NODES = 69
    TASK_STUCK = 70  # of a worker of a stage of one's own
    INTERRUPTED = 130


class PortTaken(BatonError):
    """Another program listens where Baton should."""

    code = "port_taken"


class NoAnswer(BatonError):
    """The API cannot be reached or does not answer as it should."""

    code = "no_answer"
    retryable = True


def exit_for(error: BatonError) -> Exit:
    """The exit code that stands for an error."""
    match error:
        case ConfigError():
            return Exit.USAGE
        case RedisServerError() | PortTaken() | PoolTaken():
            return Exit.UNAVAILABLE_HERE
        case RedisUnavailable() | NoAnswer():
            return Exit.NO_ANSWER
        case _:
            return Exit.FAILED
