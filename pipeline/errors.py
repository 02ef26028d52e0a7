"""The one tree of Baton's errors. `code` is stable and machine-readable; `retryable` says whether the same call may succeed later.

BatonError
├── InvalidRequest            bad input; `param` names the JSON path
│   ├── ContextLengthExceeded
│   ├── ModelNotFound
│   ├── RequestNotFound       no such request, or its record has expired
│   ├── NoSuchFile            no such file, or it has expired
│   ├── FileTooLarge          an upload has more bytes than a file may have
│   ├── UploadTimeout         an upload took longer than it may
│   └── IdempotencyConflict   the key already stands for another request
├── InvalidKey                no API key, or none that is valid
├── NotAllowed                the API key is valid, and may not do this
├── Refused                   not admitted; `retry_after_s` says when to come again
│   ├── QueueFull
│   │   └── LowLaneFull
│   ├── RateLimited           the API key has used up its requests or tokens of this minute
│   ├── KeyBusy               the API key has as many requests in the pool as it may
│   └── Draining
├── DeadlineExceeded          the request's time ran out; `stage` says where
├── RequestFailed             accepted, then ended as failed or dead-lettered
│   └── RequestCancelled      accepted, then ended by somebody before it was done
├── RetryLater                raised by a task's handler: try this task again
├── TimeLimitExceeded         a task's handler ran for longer than it may
│   ├── SoftTimeLimitExceeded raised inside the handler, which may still return something
│   └── HandlerStuck          it did not even end when it was stopped
├── EngineError
│   ├── Unservable            this engine cannot serve the model or the request, ever
│   ├── KVLost                the blocks behind a handle are not what the handle says; recompute
│   └── EngineDied            the engine's process ended or stalled
│       └── EngineDown        it was down already: nothing was started
├── NotFound                  no request, or nothing of it any more, under that id
├── TransferError             a transfer cannot start (no space, no permission)
├── WireError                 bytes that are not what the protocol says
├── RedisUnavailable          no answer from Redis within the limit
├── StorageUnavailable        the store of files failed, or did not answer within the limit
├── FileLost                  a file is known, and its bytes are gone from the store
└── ConfigError               the configuration is wrong; names the key and where it came from
"""

from __future__ import annotations

UNKNOWN_ID = "no request has this id, or its record has expired"


class BatonError(Exception):
    """Base of all errors that Baton raises on purpose."""

    code: str = "internal_error"
    retryable: bool = False


class InvalidRequest(BatonError):
    """The request is wrong and will stay wrong."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output do not fit the model's context."""

    code = "context_length_exceeded"


class ModelNotFound(InvalidRequest):
    """No pool of that name is configured."""

    code = "model_not_found"


class RequestNotFound(InvalidRequest):
    """No request of that id is known here; the record of an ended one is kept for `queue.result_ttl_s`."""

    code = "request_not_found"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"{request_id[:100]}: {UNKNOWN_ID}", param="id")


class NoSuchFile(InvalidRequest):
    """No file of that id is the caller's."""

    code = "file_not_found"

    def __init__(self, file_id: str) -> None:
        super().__init__(f"No such File object: {file_id[:100]}", param="id")  # as OpenAI says it


class BatchNotFound(InvalidRequest):
    """No batch of that id is the caller's."""

    code = "batch_not_found"

    def __init__(self, batch_id: str) -> None:
        super().__init__(f"No batch found with id {batch_id[:100]!r}", param="id")


class FileTooLarge(InvalidRequest):
    """An upload has more bytes than a file may have; nothing is kept of it."""

    code = "file_too_large"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the file has more than {max_bytes} bytes (files.max_bytes)", param="file")


class UploadTimeout(InvalidRequest):
    """An upload took longer than it may; nothing is kept of it."""

    code = "upload_timeout"


class IdempotencyConflict(InvalidRequest):
    """An idempotency key came again with something else to do."""

    code = "idempotency_conflict"


class InvalidKey(BatonError):
    """The caller showed no API key, or none that is valid; which of the two, and why, it is not told."""

    code = "invalid_api_key"


class NotAllowed(BatonError):
    """The caller's API key is valid and does not allow this; the message says what it lacks."""

    code = "permission_denied"


class Refused(BatonError):
    """Not admitted; nothing was stored."""

    code = "refused"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Refused):
    """The lane holds as many tasks or prompt tokens as it may."""

    code = "overloaded"


class LowLaneFull(QueueFull):
    """The lane of work that can wait is full; others may still be taken."""

    code = "resource_unavailable"


class RateLimited(Refused):
    """The API key has used up what it may ask for in a minute; `never_fits`: so much it may never ask for at once."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float, never_fits: bool = False) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.retryable = not never_fits


class KeyBusy(Refused):
    """The API key has as many requests waiting and running in the pool as it may."""

    code = "concurrency_limit_exceeded"


class BodyTimeout(BatonError):
    """The body of a request did not come."""

    code = "body_timeout"
    retryable = True


class Draining(Refused):
    """This process is leaving; another one takes the request."""

    code = "draining"


class DeadlineExceeded(BatonError):
    """The request's deadline passed before it was done."""

    code = "queue_timeout"
    retryable = True

    def __init__(self, message: str, *, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


class RequestFailed(BatonError):
    """An accepted request ended as failed."""

    code = "request_failed"


class RequestCancelled(RequestFailed):
    """An accepted request was cancelled before it was done."""

    code = "cancelled"


class RetryLater(BatonError):
    """A handler of a task of one's own asks for another try: after `countdown` seconds, or (None) later each time."""

    code = "retry_later"
    retryable = True

    def __init__(self, message: str, *, countdown: float | None = None) -> None:
        super().__init__(message)
        self.countdown = countdown


class TimeLimitExceeded(BatonError):
    """A handler ran for longer than its task may; repeating it would take as long again."""

    code = "time_limit"


class SoftTimeLimitExceeded(TimeLimitExceeded):
    """Raised inside a handler at its soft limit: it may clean up, and return what it has, until the hard one."""


class HandlerStuck(TimeLimitExceeded):
    """A handler that was stopped at its hard limit goes on all the same; only the end of its process ends it."""


class EngineError(BatonError):
    """Base of what engines raise."""

    code = "engine_error"


class Unservable(EngineError):
    """This engine cannot serve the model or request; the message says why."""

    code = "unservable"


class KVLost(EngineError):
    """A handle's blocks are gone or wrong. `reason`: gone, generation, layout, digest."""

    code = "kv_lost"
    retryable = True

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class EngineDied(EngineError):
    """The engine's process ended or stalled; its tasks are handed back."""

    code = "engine_died"
    retryable = True


class EngineDown(EngineDied):
    """The engine's process was not running when it was called: the task has not been near it."""

    code = "engine_down"


class NotFound(BatonError):
    """No request, or nothing of it any more, under that id; the message says what is missing."""

    code = "not_found"


class TransferError(BatonError):
    """A transfer cannot do its work on this machine."""

    code = "transfer_error"


class WireError(BatonError):
    """Bytes that do not follow the protocol; the message holds the path of the field."""

    code = "wire_error"


class RedisUnavailable(BatonError):
    """Redis did not answer within the limit."""

    code = "redis_unavailable"
    retryable = True


class StorageUnavailable(BatonError):
    """The store of files failed, or did not answer within the limit; its own words are in the log."""

    code = "storage_unavailable"
    retryable = True


class FileLost(BatonError):
    """A file is known, and its bytes are not in the store: somebody removed them there, or `files.url` is another one here."""

    code = "file_lost"


class ConfigError(BatonError):
    """A key of the configuration is unknown, missing or of the wrong type."""

    code = "config_error"
