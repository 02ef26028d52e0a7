"""A process that exports, for tests that kill it: exports blocks, prints the handle, waits for stdin to end, closes.

`python -m tests.contract.transfer_owner shm|tcp|nixl|auto FOLDER BYTES SEED`
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import cast

import msgspec

from tests.contract.transfer_blocks import ARENA, Bytes, Kind, transfer_of


async def main(kind: str, place: str, nbytes: str, seed: str) -> None:
    transfer = transfer_of(cast(Kind, kind), Path(place), "child@host.1", arena_bytes=max(ARENA, int(nbytes)))
    await transfer.start()
    handle = await transfer.export(Bytes(int(nbytes), seed=int(seed)))
    print(msgspec.json.encode(handle).decode(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await transfer.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
