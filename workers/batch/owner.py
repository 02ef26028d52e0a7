"""Whose batch it is: one whose API key is revoked does not go on, as if its owner had cancelled it."""

from __future__ import annotations

import asyncio
import time

import structlog

from pipeline.batches.record import CANCELLING, BatchRecord
from pipeline.batches.records import BatchRecords
from pipeline.errors import RedisUnavailable
from pipeline.key_store import KeyStore

log = structlog.get_logger("baton.batches")


async def cancel_when_revoked(store: KeyStore, records: BatchRecords, record: BatchRecord, look_s: float) -> None:
    """Look at the key of a batch until it is revoked; then cancel the batch. A batch without an owner has none."""
    while record.owner:
        try:
            if await _is_revoked(store, record.owner):
                await records.turn(record, CANCELLING, cancelling_s=int(time.time()))
                log.warning("batch cancelled: its API key was revoked", batch_id=record.id, owner=record.owner)
                return
        except RedisUnavailable as error:
            log.debug("the API key of a batch was not looked at", batch_id=record.id, error=str(error))
        await asyncio.sleep(look_s)


async def _is_revoked(store: KeyStore, owner: str) -> bool:
    """Keys of a file are not known here, so none of them is revoked."""
    return any(key.revoked_s for key in (await store.read()).keys.values() if key.id == owner)
