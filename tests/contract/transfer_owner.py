"""A process that owns an arena, for tests that kill it: exports blocks, prints the handle, waits for stdin to end, closes."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from tests.contract.transfer_blocks import Bytes, shm


async def main(place: str, nbytes: str, seed: str) -> None:
    transfer = shm(Path(place), "child@host.1")
    await transfer.start()
    handle = await transfer.export(Bytes(int(nbytes), seed=int(seed)))
    print(msgspec.json.encode(handle).decode(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await transfer.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
