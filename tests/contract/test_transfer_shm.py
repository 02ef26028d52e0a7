"""What only shared memory can get wrong: files, locks, crashes, hostile handles."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pipeline.config import TransferSettings
from pipeline.errors import TransferError, WireError
from pipeline.protocol import KVHandle
from tests.contract.transfer_blocks import ARENA, SLAB, Bytes, Sink, altered, outcome, owner_process, running, shm
from workers.transfers.arena import HEADER, MAGIC, Arena, Header, remove_orphans
from workers.transfers.block_transfer import BlockTransfer
from workers.transfers.ways.shm import MAX_PEERS

GOOD = "baton-x-0123456789abcdef"


started = partial(running, "shm")
child = partial(owner_process, "shm")


def arenas(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name.startswith("baton-"))


def file_of(place: Path, handle: KVHandle) -> Path:
    return place / str(handle.params["arena"])


# The file and its life


async def test_the_file_is_private_named_and_whole(tmp_path: Path):
    async with started(tmp_path, "prefill@host.1/../x") as owner:
        (name,) = arenas(tmp_path)
        assert name.startswith("baton-prefill_host_1_x-")
        status = (tmp_path / name).lstat()
        assert stat.S_ISREG(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_blocks * 512 >= ARENA  # every page is there before the first export
        assert owner.stats().bytes_free == ARENA
    assert arenas(tmp_path) == []


async def test_a_narrow_umask_and_long_or_empty_names_change_nothing(tmp_path: Path):
    before = os.umask(0o777)
    try:
        async with started(tmp_path, "ü" * 300), started(tmp_path, ""):
            assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in arenas(tmp_path)] == [0o600, 0o600]
    finally:
        os.umask(before)


async def test_a_reader_makes_no_file(tmp_path: Path):
    async with started(tmp_path, "decode", exports=False):
        assert arenas(tmp_path) == []


async def test_live_owners_leave_one_another_alone(tmp_path: Path):
    async with started(tmp_path, "same") as first, started(tmp_path, "same") as second, child(tmp_path, 10, 1):
        assert len(arenas(tmp_path)) == 3
        async with started(tmp_path, "reader", exports=False) as reader:
            assert len(arenas(tmp_path)) == 3
            for owner in (first, second):
                assert await outcome(reader, await owner.export(Bytes(1000))) == "ok"


async def test_an_owner_killed_before_the_fetch(tmp_path: Path):
    """What it exported stays readable until some process starts there; then it is gone, and so is the file."""
    async with started(tmp_path, "decode", exports=False) as reader, child(tmp_path, 3 * SLAB, 7) as (process, handle):
        process.send_signal(signal.SIGKILL)
        await process.wait()
        sink = Sink(handle.nbytes)
        await reader.fetch(handle, sink)
        assert np.array_equal(sink.data, Bytes(3 * SLAB, seed=7).data)
        assert arenas(tmp_path) == [handle.params["arena"]]
        async with started(tmp_path, "next", exports=False):
            assert arenas(tmp_path) == []
        assert await outcome(reader, handle) == "gone"


async def test_an_owner_killed_and_removed_in_the_middle_of_a_copy(tmp_path: Path):
    loop = asyncio.get_running_loop()
    async with started(tmp_path, "decode", exports=False) as reader, child(tmp_path, ARENA, 7) as (process, handle):

        class Slow(Sink):
            def scatter(self, data: memoryview) -> None:
                process.send_signal(signal.SIGKILL)
                asyncio.run_coroutine_threadsafe(process.wait(), loop).result(60)
                assert remove_orphans(tmp_path) == [handle.params["arena"]]
                super().scatter(data)

        sink = Slow(handle.nbytes)
        await reader.fetch(handle, sink)
        assert np.array_equal(sink.data, Bytes(ARENA, seed=7).data)
    assert arenas(tmp_path) == []


async def test_a_reader_killed_leaves_the_owner_whole(tmp_path: Path):
    """A reader holds no lock and writes nothing: the owner does not notice its end."""
    async with started(tmp_path) as owner, child(tmp_path, 10, 1) as (process, _):
        handle = await owner.export(Bytes(SLAB))
        process.kill()
        await process.wait()
        async with started(tmp_path, "decode", exports=False) as reader:
            assert arenas(tmp_path) == [handle.params["arena"]]
            assert await outcome(reader, handle) == "ok"


async def test_an_orderly_end_of_a_process_leaves_nothing(tmp_path: Path):
    async with child(tmp_path, 10, 1) as (process, _):
        assert len(arenas(tmp_path)) == 1
        await process.communicate(b"")
        assert process.returncode == 0
    assert arenas(tmp_path) == []


def test_creating_and_removing_at_once(tmp_path: Path):
    """Removers run as fast as they can while arenas come and go: none is lost between its making and its end."""
    stop = threading.Event()

    def remove() -> None:
        while not stop.is_set():
            remove_orphans(tmp_path)

    removers = [threading.Thread(target=remove) for _ in range(3)]
    for thread in removers:
        thread.start()
    try:
        for _ in range(1500):
            arena = Arena.create(tmp_path, "w", arena_bytes=4096, slab_bytes=4096)
            assert arena.path.exists()
            arena.close()
    finally:
        stop.set()
        for thread in removers:
            thread.join()
    assert arenas(tmp_path) == []


def test_only_what_is_an_orphan_of_ours_is_removed(tmp_path: Path):
    (tmp_path / GOOD).write_bytes(b"")  # died between creating and filling
    kept = ["baton-x-0123456789abcde", "baton-x-0123456789ABCDEF", f"{GOOD}.txt", "other", f"x{GOOD}"]
    for name in kept:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "target").write_bytes(b"")
    (tmp_path / "baton-link-0123456789abcdef").symlink_to(tmp_path / "target")
    (tmp_path / "baton-dir-0123456789abcdef").mkdir()
    os.mkfifo(tmp_path / "baton-fifo-0123456789abcdef", 0o600)
    kept += ["target", "baton-link-0123456789abcdef", "baton-dir-0123456789abcdef", "baton-fifo-0123456789abcdef"]
    if os.geteuid() == 0:
        (tmp_path / "baton-uid-0123456789abcdef").write_bytes(b"")
        os.chown(tmp_path / "baton-uid-0123456789abcdef", 12345, -1)
        kept.append("baton-uid-0123456789abcdef")
    assert remove_orphans(tmp_path) == [GOOD]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


# What start refuses


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


async def test_full_shared_memory_is_said_at_start(small_tmpfs: Path):
    transfer = shm(small_tmpfs, "prefill")
    with pytest.raises(TransferError) as error:
        await transfer.start()
    wanted = Header.of(GOOD, SLAB, ARENA // SLAB).file_bytes
    for part in (f"{wanted} bytes wanted", "1048576 free", "transfer.arena_bytes", str(small_tmpfs)):
        assert part in str(error.value)
    assert arenas(small_tmpfs) == []
    await transfer.close()


@pytest.mark.parametrize(
    ("arena_bytes", "slab_bytes"), [(SLAB, 0), (SLAB, -4096), (SLAB, 1000), (SLAB, 2 * SLAB), (0, SLAB)]
)
async def test_sizes_that_make_no_sense(tmp_path: Path, arena_bytes: int, slab_bytes: int):
    settings = TransferSettings(kind="shm", dir=str(tmp_path), arena_bytes=arena_bytes, slab_bytes=slab_bytes)
    with pytest.raises(TransferError, match=r"transfer.slab_bytes"):
        await BlockTransfer(settings, "prefill").start()
    assert arenas(tmp_path) == []


async def test_a_directory_that_is_not_there(tmp_path: Path):
    with pytest.raises(TransferError, match=r"transfer.dir = .*/nowhere"):
        await shm(tmp_path / "nowhere", "prefill").start()


# What a handle may do


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"arena": "/etc/passwd"}, "wire"),
    ({"arena": f"../{GOOD}"}, "wire"),
    ({"arena": f"{GOOD}\n"}, "wire"),
    ({"arena": f"{GOOD}\0"}, "wire"),
    ({"arena": ""}, "wire"),
    ({"arena": "baton-../../x-0123456789abcdef"}, "wire"),
    ({"arena": 7}, "wire"),
    ({"arena": None}, "wire"),
    ({"arena": b"x"}, "wire"),
    ({"arena": GOOD}, "gone"),
    ({"first": -1}, "wire"),
    ({"first": 2**80}, "wire"),
    ({"first": 1.5}, "wire"),
    ({"first": "0"}, "wire"),
    ({"first": True}, "wire"),
    ({"first": None}, "wire"),
    ({"first": [0]}, "wire"),
    ({"first": 2**32 - 1}, "gone"),
    ({"first": ARENA // SLAB - 1}, "gone"),
    ({"first": 5}, "generation"),
    ({"count": 0}, "gone"),
    ({"count": 1}, "gone"),
    ({"count": 3}, "gone"),
    ({"count": 2**32 - 1}, "gone"),
    ({"generation": 0}, "wire"),
    ({"generation": 2}, "generation"),
    ({"generation": 2**63 - 1}, "generation"),
    ({"generation": 2**64}, "wire"),
    ({"more": 1}, "wire"),
]


@pytest.mark.parametrize(("params", "expected"), HOSTILE, ids=str)
async def test_a_hostile_handle_is_an_error_and_no_more(tmp_path: Path, params: dict[str, Any], expected: str):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(2 * SLAB))
        assert await outcome(reader, altered(handle, **params)) == expected
        assert await outcome(reader, handle) == "ok"


@pytest.mark.parametrize("missing", ["arena", "first", "count", "generation"])
async def test_a_field_that_is_missing(tmp_path: Path, missing: str):
    async with started(tmp_path) as owner:
        handle = await owner.export(Bytes(10))
        params = {key: value for key, value in handle.params.items() if key != missing}
        with pytest.raises(WireError, match=missing):
            await owner.fetch(msgspec.structs.replace(handle, params=params), Sink(10))


async def test_a_size_that_the_slabs_do_not_have(tmp_path: Path):
    async with started(tmp_path) as owner:
        handle = await owner.export(Bytes(10))
        for nbytes in (SLAB + 1, 2 * ARENA):
            assert await outcome(owner, msgspec.structs.replace(handle, nbytes=nbytes)) == "gone"


def header_for(name: str, **changes: Any) -> bytes:
    return HEADER.pack(*Header.of(name, SLAB, ARENA // SLAB)._replace(**changes))


BAD_FILES: dict[str, bytes] = {
    "empty": b"",
    "short": header_for(GOOD),
    "zeros": bytes(2 * ARENA),
    "noise": random.Random(1).randbytes(2 * ARENA),
    "other magic": header_for(GOOD, magic=MAGIC[::-1]).ljust(2 * ARENA),
    "other nonce": header_for(GOOD, nonce=1).ljust(2 * ARENA),
    "no slab size": header_for(GOOD, slab_bytes=0).ljust(2 * ARENA),
    "more slabs than bytes": HEADER.pack(*Header.of(GOOD, SLAB, 2**40)).ljust(2 * ARENA),
    "slabs without end": header_for(GOOD, num_slabs=2**64 - 1).ljust(2 * ARENA),
    "data elsewhere": header_for(GOOD, data_offset=2**63).ljust(2 * ARENA),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES.keys())
async def test_a_file_that_is_no_arena(tmp_path: Path, content: bytes):
    async with started(tmp_path) as owner:
        handle = await owner.export(Bytes(10))
        (tmp_path / GOOD).touch(0o600)
        (tmp_path / GOOD).write_bytes(content)
        assert await outcome(owner, altered(handle, arena=GOOD)) == "gone"


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo", "mode", "uid"])
async def test_a_file_that_must_not_be_read(tmp_path: Path, kind: str):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(10))
        real, name = file_of(tmp_path, handle), tmp_path / GOOD
        if kind == "symlink":
            real.rename(tmp_path / "elsewhere")
            real.symlink_to(tmp_path / "elsewhere")
        elif kind == "directory":
            name.mkdir()
        elif kind == "fifo":
            os.mkfifo(name, 0o600)
        elif kind == "mode":
            real.chmod(0o644)
        elif os.geteuid() == 0:
            os.chown(real, 12345, -1)
        else:
            pytest.skip("only root can give a file away")
        target = handle if kind in ("symlink", "mode", "uid") else altered(handle, arena=GOOD)
        assert await outcome(reader, target) == "gone"


@pytest.mark.parametrize("at", [0, SLAB, 3 * SLAB - 1])
async def test_one_flipped_byte_is_found(tmp_path: Path, at: int):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(3 * SLAB))
        assert await outcome(reader, handle) == "ok"
        with file_of(tmp_path, handle).open("r+b") as file:
            offset = Header.of(str(handle.params["arena"]), SLAB, ARENA // SLAB).data_offset + at
            byte = os.pread(file.fileno(), 1, offset)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), offset)
        assert await outcome(reader, handle) == "digest"


async def test_a_replaced_file_is_mapped_anew(tmp_path: Path):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(10))
        assert await outcome(reader, handle) == "ok"
        path = file_of(tmp_path, handle)
        copy = path.read_bytes()
        path.unlink()
        path.touch(0o600)
        path.write_bytes(copy[: ARENA // 2])
        assert await outcome(reader, handle) == "gone"
        path.write_bytes(copy)
        assert await outcome(reader, handle) == "ok"


async def test_mappings_of_others_are_bounded_and_end_with_their_files(tmp_path: Path):
    def mapped() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return len({line.split(maxsplit=5)[5] for line in lines if " r--s " in line and str(tmp_path) in line})

    async with started(tmp_path, "decode", exports=False) as reader:
        owners = [shm(tmp_path, f"p{number}") for number in range(MAX_PEERS + 4)]
        for owner in owners:
            await owner.start()
            assert await outcome(reader, await owner.export(Bytes(10))) == "ok"
        assert mapped() == MAX_PEERS
        for owner in owners[:-1]:
            await owner.close()
        assert await outcome(reader, await owners[-1].export(Bytes(10))) == "ok"
        assert mapped() == 1
        await owners[-1].close()
    assert mapped() == 0


async def test_live_extents_never_overlap(tmp_path: Path):
    """Many exports and releases at once, in the slabs that the handles name."""
    draw = random.Random(5)
    live: dict[str, range] = {}
    async with started(tmp_path) as owner:

        async def one(number: int) -> None:
            handle = await owner.export(Bytes(int(2 ** draw.uniform(0, 21)), seed=number))
            slabs = range(handle.params["first"], handle.params["first"] + handle.params["count"])
            assert all(set(slabs).isdisjoint(other) for other in live.values())
            live[handle.id] = slabs
            for _ in range(draw.randrange(5)):
                await asyncio.sleep(0)
            del live[handle.id]
            await owner.release(handle.id)

        await asyncio.gather(*(one(number) for number in range(300)))
        assert owner.stats().bytes_free == ARENA
