"""Names that must not clash or be guessed."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Collection


def new_request_id(pool: str) -> str:
    """An unguessable id (128 bits) that names its pool: `<pool>-<22 characters>`."""
    return f"{pool}-{secrets.token_urlsafe(16)}"


def pool_of(request_id: str) -> str:
    """The pool that a request id names; empty when it is not a request id."""
    return request_id[:-23] if len(request_id) > 23 and request_id[-23] == "-" else ""


def bare_id(text: str, pools: Collection[str]) -> str:
    """A request's id as one of the `pools` has it, also where it is given as an answer's `id`: `chatcmpl-<id>`, `cmpl-<id>`,
    `resp_<id>` or `msg_<id>`."""
    if pool_of(text) in pools:
        return text
    return text.removeprefix("chatcmpl-").removeprefix("cmpl-").removeprefix("resp_").removeprefix("msg_")


def new_process_name(role: str) -> str:
    """A process's name with a boot nonce, so that a restarted process is never taken for its predecessor."""
    host = socket.gethostname().split(".")[0]
    return f"{role}-{host}-{os.getpid()}-{secrets.token_hex(3)}"
