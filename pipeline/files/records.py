"""What Redis knows of files: a hash each, and lists of ids, which are in the order of their making."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Collection

import msgspec

from pipeline.connection import Connection, Script
from pipeline.dated import all_found, found
from pipeline.files.record import FileRecord
from pipeline.keys import FILES_ROOT, file_expiries, file_list, file_record, files_folder, files_sweeper

AT_ONCE = 1000  # records in one round trip


class FileRecords:
    """The records of all files. Every method raises RedisUnavailable."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._put, self._drop = Script("put_file"), Script("drop_file")

    async def put(self, record: FileRecord) -> None:
        """Make a file known. Raises QueueFull where Redis has no memory for it."""
        fields = itertools.chain.from_iterable(msgspec.to_builtins(record).items())
        await self._connection.call(
            self._put, FILES_ROOT, record.id, record.owner, record.purpose, record.expires_s, *fields, waits_for_memory=False
        )  # fmt: skip

    async def drop(self, record: FileRecord) -> None:
        """Forget a file, whether or not it is known."""
        await self._connection.call(self._drop, FILES_ROOT, record.id, record.owner, record.purpose)

    async def find(self, file_id: str) -> FileRecord | None:
        """What is known of a file."""
        return await found(self._connection, FileRecord, file_record(file_id))

    async def page(
        self, owner: str, purpose: str, after: str, most: int, now_s: float, *, newest_first: bool
    ) -> list[FileRecord]:
        """Up to `most` files of an owner behind the id `after` (empty: from the start), whether or not there still is such a file.
        `purpose` empty: of any."""
        found: list[FileRecord] = []
        command, end = ("ZREVRANGEBYLEX", "-") if newest_first else ("ZRANGEBYLEX", "+")
        begin = f"({after}" if after else "+" if newest_first else "-"
        while len(found) < most:
            count = min(most - len(found), AT_ONCE)
            key = file_list(owner, purpose)
            ids = [
                name.decode() for name in await self._connection.command(command, key, begin, end, "LIMIT", 0, count)
            ]
            found += [one for one in await self.known(ids) if one.is_there(now_s)]
            if len(ids) < count:
                break
            begin = f"({ids[-1]}"
        return found

    async def known(self, ids: Collection[str]) -> list[FileRecord]:
        """The records of those that there are."""
        return await all_found(self._connection, FileRecord, [file_record(one) for one in ids])

    async def expired(self, now_s: float) -> list[FileRecord]:
        """Files whose time is over, some at a time."""
        ids = await self._connection.command("ZRANGEBYSCORE", file_expiries(), "-inf", int(now_s), "LIMIT", 0, AT_ONCE)
        return await self.known([name.decode() for name in ids])

    async def unknown(self, ids: list[str]) -> list[str]:
        """Those that there is no record of."""
        unknown: list[str] = []
        for begin in range(0, len(ids), AT_ONCE):
            some = ids[begin : begin + AT_ONCE]
            there = await self._connection.commands(*[("EXISTS", file_record(one)) for one in some])
            unknown += [one for one, is_there in zip(some, there, strict=True) if not is_there]
        return unknown

    async def folder(self) -> str:
        """Where in the store the bytes of this Redis's files are: what another Redis knows of is nothing to this one, which must
        not take it for left over."""
        key = files_folder()
        await self._connection.command("SET", key, secrets.token_hex(8), "NX")
        folder: bytes = await self._connection.command("GET", key)
        return folder.decode()

    async def takes_turn(self, every_s: float) -> bool:
        """Whether it is the caller who sweeps now: once in a while, of all processes."""
        return bool(await self._connection.command("SET", files_sweeper(), 1, "NX", "PX", int(every_s * 1000)))
