"""What reader and owner say once they know each other. Every message has a fixed length, so none can be too long.

    reader -> owner    request: handle id (16)  generation (8)  offset (8)  nbytes (8)
    owner  -> reader   head:    status (1)      where it is not SENT, that is all
                       the bytes
                       tail:    status (1)      whether they were still of that generation
                                xxh3-128 (16)   of the bytes that were meant

A request for no bytes asks whether the handle is still good, and to have its bytes in host memory where they lie on a GPU.
Little-endian; one request after the other on a connection.
"""

from __future__ import annotations

import enum
import re
import struct
from typing import NamedTuple

_REQUEST = struct.Struct("<16sQQQ")
_TAIL = struct.Struct("<B16s")
HANDLE_ID = re.compile(r"[0-9a-f]{32}")
REQUEST_BYTES, HEAD_BYTES, TAIL_BYTES = _REQUEST.size, 1, _TAIL.size


class Status(enum.IntEnum):
    """How a request ends."""

    SENT = 0
    GENERATION = 1  # released, or never exported here
    OUTSIDE = 2  # more bytes than were exported


class Request(NamedTuple):
    """A part of one export."""

    handle_id: str  # 32 hexadecimal digits
    generation: int
    offset: int
    nbytes: int

    def pack(self) -> bytes:
        """The id must be what `HANDLE_ID` matches."""
        return _REQUEST.pack(bytes.fromhex(self.handle_id), self.generation, self.offset, self.nbytes)

    @classmethod
    def unpack(cls, data: bytes) -> Request:
        """The reverse; whatever the bytes are, they are a request."""
        handle_id, generation, offset, nbytes = _REQUEST.unpack(data)
        return cls(handle_id.hex(), generation, offset, nbytes)


def head(status: Status) -> bytes:
    """What comes before the bytes."""
    return bytes([status])


def tail(status: Status, digest: bytes) -> bytes:
    """What comes after them."""
    return _TAIL.pack(status, digest)


def read_head(data: bytes) -> Status:
    """Raises `ValueError` where it is no status."""
    return Status(data[0])


def read_tail(data: bytes) -> tuple[Status, bytes]:
    """Status and digest. Raises `ValueError`."""
    status, digest = _TAIL.unpack(data)
    return Status(status), digest
