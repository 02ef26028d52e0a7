"""Logs of a process: one line an event to stderr, for people (console) or programs (json).

The message is constant, what varies is in fields: `log.info("request ended", request_id=id, state="done")`. What is bound
with `structlog.contextvars.bind_contextvars(request_id=...)` stands in every line of that task. Lines of libraries that use
the standard `logging` come out in the same form.
"""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from pipeline.config import LogSettings
from pipeline.wording import counted

# They report each call, S3's with what signs it; warnings still show.
_QUIET = ("httpx", "httpcore", "asyncio", "filelock", "fsspec", "s3fs", "aiobotocore", "botocore", "python_multipart")


def configure(settings: LogSettings, process: str) -> None:
    """Sets up logging for this process; `process` ("api", "decode-0") stands in every line. Call it once, in `main`."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]

    def name_process(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event["process"] = process
        event.pop("color_message", None)  # uvicorn's second copy of the message
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        name_process,
        _timestamp(settings),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=_last(settings), foreign_pre_chain=shared))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def configure_in_others_program() -> None:
    """Lines go to the standard `logging` under their logger's name, where the program says what becomes of them; without it
    structlog would print all of them, debug included. Where somebody has configured structlog nothing is changed."""
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def _last(settings: LogSettings) -> list[Processor]:
    drop = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if settings.format == "json":
        return [drop, structlog.processors.format_exc_info, structlog.processors.JSONRenderer(sort_keys=False)]
    plain = structlog.dev.plain_traceback  # frames without local variables: those hold prompts
    return [
        drop,
        _in_celery_s_words,
        _without_control_characters,
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain),
    ]


_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r"}


def _without_control_characters(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """What clients send must not move the cursor of who reads the log; line ends in fields are written as such by structlog."""
    return {name: value.translate(_CONTROL) if isinstance(value, str) else value for name, value in event.items()}


def _in_celery_s_words(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """A worker's lines as its users know them, `Task decode[id] succeeded in 0.123s`; programs get the fields instead."""
    message = str(event.get("event", ""))
    if message in ("ready", "left") and "worker" in event:
        event["event"] = f"{event.pop('worker')} {message}."
    elif message.startswith("task ") and "task" in event and "request_id" in event:
        seconds, attempts = event.pop("seconds", None), event.pop("attempts", 0)
        took = f" in {seconds:.3f}s" if seconds is not None and message == "task succeeded" else ""
        took += f" after {counted(attempts, 'attempt')}" if attempts else ""
        text = f"Task {event.pop('task')}[{event.pop('request_id')}] {message.removeprefix('task ')}{took}"
        why, then = event.pop("why", ""), event.pop("then", "")
        event["event"] = text + (f": {why}" if why else "") + (f"; {then}" if then else "")
    return event


def _timestamp(settings: LogSettings) -> Processor:
    if settings.format == "json":
        return structlog.processors.TimeStamper(fmt="iso", utc=True)
    return structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False)
