"""Who is there: before anything else both sides prove that they know the owner's key, without showing it.

    owner  -> reader   magic (8)   owner's nonce (32)
    reader -> owner    reader's nonce (32)   HMAC-SHA256(key, "reader" + both nonces) (32)
    owner  -> reader   HMAC-SHA256(key, "owner" + both nonces) (32)

The key is made anew by each process that exports and travels in its handles, through Redis: who can read those may read the
blocks. The reader proves itself first, so a stranger gets nothing out of an owner but random bytes. Every message has a fixed
length, and no proof can be sent back or used again: each names its side and both nonces.
"""

from __future__ import annotations

import hmac
import secrets

from workers.transfers.ways.tcp.flow import Flow

MAGIC = b"BATNTCP1"
KEY_BYTES = NONCE_BYTES = PROOF_BYTES = 32


class Stranger(Exception):
    """The other side is not who it should be; the message says how that showed."""


async def as_owner(flow: Flow, key: bytes) -> None:
    """Raises `Stranger`, or `OSError` where the connection ends. Whoever calls sets the limit on the whole."""
    ours = secrets.token_bytes(NONCE_BYTES)
    await flow.write(MAGIC + ours)
    answer = await flow.read(NONCE_BYTES + PROOF_BYTES)
    theirs, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, b"reader", ours, theirs)):
        raise Stranger("it does not know the key")
    await flow.write(_proof(key, b"owner", ours, theirs))


async def as_reader(flow: Flow, key: bytes) -> None:
    """Raises `Stranger`, or `OSError` where the connection ends. Whoever calls sets the limit on the whole."""
    hello = await flow.read(len(MAGIC) + NONCE_BYTES)
    theirs = hello[len(MAGIC) :]
    if not hello.startswith(MAGIC):
        raise Stranger("it does not speak this protocol")
    ours = secrets.token_bytes(NONCE_BYTES)
    await flow.write(ours + _proof(key, b"reader", theirs, ours))
    if not hmac.compare_digest(await flow.read(PROOF_BYTES), _proof(key, b"owner", theirs, ours)):
        raise Stranger("it does not know the key")


def _proof(key: bytes, side: bytes, owners_nonce: bytes, readers_nonce: bytes) -> bytes:
    return hmac.digest(key, side + owners_nonce + readers_nonce, "sha256")
