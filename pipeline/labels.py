"""The label that a client gave its request (`X-Request-Id`): in every line that a process logs about it, and never a key to anything.

It travels as one annotation of the engine's input, which workers of an older release carry unread.
"""

from __future__ import annotations

from msgspec.structs import replace

from pipeline.protocol import BackendInput, Request

ANNOTATION = "label:"
FIELD = "x_request_id"  # in a line of the log


def with_label(request: Request, label: str) -> Request:
    """The same request with this label; an empty one is none."""
    if not label:
        return request
    annotations = [*request.input.annotations, ANNOTATION + label]
    return replace(request, input=replace(request.input, annotations=annotations))


def log_fields(request: BackendInput) -> dict[str, str]:
    """What is bound while something is done for this request."""
    for annotation in request.annotations:
        if annotation.startswith(ANNOTATION):
            return {FIELD: annotation.removeprefix(ANNOTATION)}
    return {}
