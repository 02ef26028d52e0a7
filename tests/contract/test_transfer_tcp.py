"""What only the way over TCP can get wrong: strangers, networks, peers that die or hang, memory for what arrives."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pipeline.config import TcpSettings
from pipeline.errors import KVLost, TransferError
from pipeline.protocol import KVHandle
from tests.cable import Cable
from tests.contract.transfer_blocks import ARENA, SLAB, TCP, Bytes, Sink, altered, outcome, owner_process, running
from workers.transfer import Transfer
from workers.transfers.block_transfer import BlockTransfer
from workers.transfers.ways.tcp.frames import HEAD_BYTES, TAIL_BYTES, Request, Status, read_tail
from workers.transfers.ways.tcp.handshake import MAGIC
from workers.transfers.ways.tcp.server import MAX_STRANGERS

MIB = 1_048_576
LIMIT_S = 30.0  # of what a test waits for, which comes at once
QUICK = msgspec.structs.replace(TCP, timeout_s=0.3)
PATIENT = msgspec.structs.replace(TCP, timeout_s=60.0)

started = partial(running, "tcp")


@asynccontextmanager
async def large(place: Path, *, exports: bool = True, streams: int = 4) -> AsyncIterator[BlockTransfer]:
    """For handles that are worth several connections, and more than kernels hold on their way."""
    tcp = TcpSettings(streams=streams, staging_bytes=32 * MIB, timeout_s=60)
    async with started(place, exports=exports, tcp=tcp, arena_bytes=32 * MIB) as transfer:
        yield transfer


def stream_to(handle: KVHandle) -> socket.socket:
    """A bare connection to the owner of a handle."""
    return socket.create_connection((handle.params["host"], handle.params["port"]), timeout=LIMIT_S)


def received(sock: socket.socket, nbytes: int) -> bytes:
    """So many bytes, or fewer where the other side hangs up."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while len(data) < nbytes and (part := sock.recv(nbytes - len(data))):
            data += part
    return data


def proof(handle: KVHandle, side: bytes, owners: bytes, readers: bytes) -> bytes:
    return hmac.digest(bytes.fromhex(handle.params["key"]), side + owners + readers, "sha256")


def let_in(handle: KVHandle) -> socket.socket:
    """A connection with the handshake done, written here a second time."""
    sock = stream_to(handle)
    hello = received(sock, 40)
    ours = secrets.token_bytes(32)
    sock.sendall(ours + proof(handle, b"reader", hello[8:], ours))
    assert hello.startswith(MAGIC)
    assert received(sock, 32) == proof(handle, b"owner", hello[8:], ours)
    return sock


def ask(sock: socket.socket, handle: KVHandle, **changes: Any) -> tuple[int, bytes, bytes]:
    """Status, bytes and tail of one request."""
    request = Request(handle.id, handle.params["generation"], 0, handle.nbytes)._replace(**changes)
    sock.sendall(request.pack())
    (status,) = received(sock, HEAD_BYTES)
    if status != Status.SENT:
        return status, b"", b""
    return status, received(sock, request.nbytes), received(sock, TAIL_BYTES)


def sockets() -> int:
    """Sockets of this process."""
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(fd.readlink()))
    return sum(link.startswith("socket:") for link in links)


async def until(condition: Any) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in the kernel
            await asyncio.sleep(0.005)


async def why(reader: Transfer, handle: KVHandle) -> str:
    """The words of `KVLost` gone."""
    with pytest.raises(KVLost) as error:
        await reader.fetch(handle, Sink(handle.nbytes))
    assert error.value.reason == "gone"
    return str(error.value)


async def fetched(reader: Transfer, handle: KVHandle) -> Sink:
    sink = Sink(handle.nbytes)
    await reader.fetch(handle, sink)
    return sink


def over(cable: Cable, handle: KVHandle) -> KVHandle:
    """The handle as one gets it whose way to the owner leads over the cable."""
    return altered(handle, port=cable.port)


# Who is there


async def test_a_handle_says_where_and_proves_who(tmp_path: Path):
    async with started(tmp_path) as owner, started(tmp_path, "other") as other:
        handle, foreign = await owner.export(Bytes(10)), await other.export(Bytes(10))
        assert (handle.transfer, set(handle.params)) == ("tcp", {"host", "port", "key", "generation"})
        assert handle.params["host"] == "127.0.0.1"
        assert handle.params["key"] != foreign.params["key"]


async def test_who_knows_the_key_is_served_as_the_protocol_says(tmp_path: Path):
    async with started(tmp_path, verify=False) as owner:
        blocks = Bytes(100_000)
        handle = await owner.export(blocks)

        def talk() -> None:
            with let_in(handle) as sock:
                for offset, nbytes in ((0, 100_000), (5, 70_000), (100_000, 0)):
                    status, data, tail = ask(sock, handle, offset=offset, nbytes=nbytes)
                    assert (status, data) == (Status.SENT, blocks.data.tobytes()[offset : offset + nbytes])
                    assert read_tail(tail)[0] is Status.SENT
                assert ask(sock, handle, generation=99)[0] == Status.GENERATION
                assert ask(sock, handle, handle_id="0" * 32)[0] == Status.GENERATION
                for offset, nbytes in ((0, 100_001), (100_001, 0), (2**64 - 1, 2**64 - 1), (0, 2**63)):
                    assert ask(sock, handle, offset=offset, nbytes=nbytes)[0] == Status.OUTSIDE
                assert ask(sock, handle)[0] == Status.SENT

        await asyncio.to_thread(talk)


def wrong_proof(sock: socket.socket, handle: KVHandle) -> None:
    sock.sendall(secrets.token_bytes(64))


def its_own_words(sock: socket.socket, handle: KVHandle) -> None:
    """A proof of the owner's side instead of the reader's."""
    hello, ours = received(sock, 40), secrets.token_bytes(32)
    sock.sendall(ours + proof(handle, b"owner", hello[8:], ours))


def nonces_exchanged(sock: socket.socket, handle: KVHandle) -> None:
    hello, ours = received(sock, 40), secrets.token_bytes(32)
    sock.sendall(ours + proof(handle, b"reader", ours, hello[8:]))


def a_proof_again(sock: socket.socket, handle: KVHandle) -> None:
    """What a reader said on another connection."""
    ours = secrets.token_bytes(32)
    with stream_to(handle) as first:
        said = ours + proof(handle, b"reader", received(first, 40)[8:], ours)
        first.sendall(said)
        assert len(received(first, 32)) == 32
    sock.sendall(said)


def http(sock: socket.socket, handle: KVHandle) -> None:
    sock.sendall(b"GET / HTTP/1.1\r\nHost: owner\r\nUser-Agent: " + b"x" * 100_000)


def a_request_at_once(sock: socket.socket, handle: KVHandle) -> None:
    sock.sendall(Request(handle.id, handle.params["generation"], 0, handle.nbytes).pack() * 2)


@pytest.mark.parametrize(
    "says",
    [wrong_proof, its_own_words, nonces_exchanged, a_proof_again, http, a_request_at_once],
    ids=lambda f: f.__name__,
)
async def test_a_stranger_gets_random_bytes_and_no_more(tmp_path: Path, says: Any):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(1000))

        def talk() -> bytes:
            with stream_to(handle) as sock:
                with contextlib.suppress(ConnectionError):
                    says(sock, handle)
                return received(sock, 10_000)

        assert len(await asyncio.to_thread(talk)) <= 40
        assert await outcome(reader, handle) == "ok"


@pytest.mark.parametrize("said", [b"", b"x" * 63], ids=["nothing", "almost all"])
async def test_who_does_not_say_who_it_is_is_hung_up_on(tmp_path: Path, said: bytes):
    async with started(tmp_path, tcp=QUICK) as owner:
        handle = await owner.export(Bytes(10))

        def talk() -> bytes:
            with stream_to(handle) as sock:
                sock.sendall(said)
                return received(sock, 41)  # returns when the owner hangs up

        assert len(await asyncio.to_thread(talk)) == 40


async def test_any_number_of_silent_strangers_keep_nobody_out_and_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING)
    async with started(tmp_path, tcp=PATIENT) as owner, started(tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(10))
        before = sockets()
        strangers = [await asyncio.to_thread(stream_to, handle) for _ in range(3 * MAX_STRANGERS)]
        for sock in strangers[::7]:
            sock.sendall(b"x")
        assert await outcome(reader, handle) == "ok"
        await until(lambda: sockets() - before <= len(strangers) + MAX_STRANGERS + 2)  # and the reader's own two ends
        assert len(await asyncio.to_thread(received, strangers[0], 41)) == 40  # the first were hung up on
        for sock in strangers:
            sock.close()
        await until(lambda: sockets() <= before + 2)
        assert await outcome(reader, handle) == "ok"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) == 2, said


async def test_an_owner_that_cannot_prove_itself_gets_nothing_out_of_a_reader(tmp_path: Path):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False, tcp=QUICK) as reader:
        handle = await owner.export(Bytes(10))
        heard: list[bytes] = []

        async def hear(stream: asyncio.StreamReader) -> None:
            heard.append(b"")
            with contextlib.suppress(ConnectionError):  # hung up on with bytes unread
                heard[-1] = await stream.read()

        async def pretend(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(MAGIC + bytes(32))
            heard.append(await stream.readexactly(64))
            writer.write(heard[0][32:])  # what it heard, or anything
            await hear(stream)
            writer.close()

        async def speak_otherwise(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n" * 10_000)
            await hear(stream)
            writer.close()

        async def be_silent(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await hear(stream)
            writer.close()

        said = {pretend: "does not know the key", speak_otherwise: "does not speak", be_silent: "no connection within"}
        for impostor, words in said.items():
            server = await asyncio.start_server(impostor, "127.0.0.1", 0)
            assert words in await why(reader, altered(handle, port=server.sockets[0].getsockname()[1]))
            server.close()
        await until(lambda: len(heard) == 4)
        assert heard[1:] == [b"", b"", b""]
        assert bytes.fromhex(handle.params["key"]) not in heard[0]


async def test_another_key_is_refused(tmp_path: Path):
    """As after a restart of the owner that got the same port."""
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(10))
        assert "closed the connection" in await why(reader, altered(handle, key="0" * 64))


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"host": ""}, "wire"),
    ({"host": "x" * 256}, "wire"),
    ({"host": None}, "wire"),
    ({"host": "no such host"}, "wire"),
    ({"host": "127.0.0.1\0"}, "wire"),
    ({"host": "no-such-host.invalid"}, "gone"),
    ({"host": "."}, "gone"),
    ({"host": "x" * 255}, "gone"),
    ({"host": "\N{SNOWMAN}" * 80}, "wire"),
    ({"port": 0}, "wire"),
    ({"port": 65536}, "wire"),
    ({"port": "80"}, "wire"),
    ({"port": True}, "wire"),
    ({"key": "0" * 63}, "wire"),
    ({"key": "0" * 64 + "\n"}, "wire"),
    ({"key": "G" * 64}, "wire"),
    ({"key": "0" * 64}, "gone"),
    ({"generation": 0}, "wire"),
    ({"generation": 7}, "generation"),
    ({"generation": 2**63}, "wire"),
    ({"more": 1}, "wire"),
]


@pytest.mark.parametrize(("params", "expected"), HOSTILE, ids=lambda value: ascii(value)[:40])
async def test_a_hostile_handle_is_an_error_and_no_more(tmp_path: Path, params: dict[str, Any], expected: str):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(10))
        assert await outcome(reader, altered(handle, **params)) == expected
        assert await outcome(reader, handle) == "ok"


@pytest.mark.parametrize("handle_id", ["", "x", "0" * 31, "0" * 33, "G" * 32])
async def test_an_id_that_no_owner_gives(tmp_path: Path, handle_id: str):
    async with started(tmp_path) as owner:
        handle = msgspec.structs.replace(await owner.export(Bytes(10)), id=handle_id)
        assert await outcome(owner, handle) == "wire"


async def test_a_size_that_was_not_exported(tmp_path: Path):
    async with started(tmp_path) as owner:
        handle = await owner.export(Bytes(10))
        assert await outcome(owner, msgspec.structs.replace(handle, nbytes=SLAB)) == "gone"


# What networks and peers do


@pytest.mark.parametrize("after", [0, 20, 60, 80, 100, 500_000, 2 * MIB + 85], ids=str)
async def test_a_network_that_goes_silent_ends_the_fetch(tmp_path: Path, after: int):
    """At every stage: before hello, in it, before the proof, in the head, the bytes, the tail."""
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False, tcp=QUICK) as reader:
        handle = await owner.export(Bytes(2 * MIB))
        async with Cable(handle.params["port"]) as cable:
            cable.hold_after(after)
            said = await why(reader, over(cable, handle))
            assert "nothing moved for 0.3 s" in said or "no connection within 0.3 s" in said
            assert cable.held.is_set()
            cable.let_go()
            assert await outcome(reader, over(cable, handle)) == "ok"
        assert await outcome(reader, handle) == "ok"


@pytest.mark.parametrize("after", [0, 60, 500_000, 2 * MIB + 85], ids=str)
async def test_a_connection_that_breaks_ends_the_fetch(tmp_path: Path, after: int):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False, tcp=PATIENT) as reader:
        handle = await owner.export(Bytes(2 * MIB))
        async with Cable(handle.params["port"]) as cable:
            cable.hold_after(after)
            fetch = asyncio.create_task(why(reader, over(cable, handle)))
            await cable.held.wait()
            cable.cut()
            assert f":{cable.port}: " in await fetch


async def test_an_owner_killed_in_the_middle_of_a_fetch(tmp_path: Path):
    """More is left to send than its kernel, which outlives it, holds."""
    nbytes = 32 * MIB
    roomy = msgspec.structs.replace(PATIENT, staging_bytes=nbytes, streams=1)
    async with (
        started(tmp_path, "decode", exports=False, tcp=roomy) as reader,
        owner_process("tcp", tmp_path, nbytes, 7) as (process, handle),
        Cable(handle.params["port"]) as cable,
    ):
        assert np.array_equal((await fetched(reader, handle)).data, Bytes(nbytes, seed=7).data)
        cable.hold_after(MIB)
        sink = Sink(handle.nbytes)
        fetch = asyncio.create_task(reader.fetch(over(cable, handle), sink))
        await cable.held.wait()
        process.send_signal(signal.SIGKILL)
        await process.wait()
        cable.let_go()
        with pytest.raises(KVLost, match=r"closed the connection|reset") as error:
            await fetch
        assert error.value.reason == "gone"
        assert not sink.touched
        assert await outcome(reader, handle) == "gone"  # over the connection that was kept, too


async def test_an_owner_that_stops_in_the_middle_of_a_fetch(tmp_path: Path):
    """Its kernel goes on taking what it is sent; only the clock tells."""
    async with (
        started(tmp_path, "decode", exports=False, tcp=QUICK) as reader,
        owner_process("tcp", tmp_path, 3 * MIB, 7) as (process, handle),
    ):
        process.send_signal(signal.SIGSTOP)
        assert "within 0.3 s" in await why(reader, handle)
        process.send_signal(signal.SIGCONT)
        assert await outcome(reader, handle) == "ok"


async def test_a_reader_that_goes_away_in_the_middle_costs_the_owner_nothing(tmp_path: Path):
    async with started(tmp_path, tcp=PATIENT) as owner, started(tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(ARENA))
        before = sockets()
        gone = await asyncio.to_thread(let_in, handle)
        gone.sendall(Request(handle.id, handle.params["generation"], 0, ARENA).pack())
        assert len(await asyncio.to_thread(received, gone, 1000)) == 1000
        gone.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
        )  # close with a reset, as the kernel of a dead one
        gone.close()
        await until(lambda: sockets() == before)
        assert await outcome(reader, handle) == "ok"
        await owner.release(handle.id)
        assert (owner.stats().handles, owner.stats().bytes_used) == (0, 0)


async def test_a_reader_that_takes_nothing_is_hung_up_on(tmp_path: Path):
    async with started(tmp_path, tcp=QUICK) as owner:
        handle = await owner.export(Bytes(ARENA))
        lazy = await asyncio.to_thread(let_in, handle)
        before = sockets()
        with lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            request = Request(handle.id, handle.params["generation"], 0, ARENA).pack()
            lazy.sendall(request * 10)
            await until(lambda: sockets() < before)  # the owner's end


async def test_memory_freed_and_used_again_on_its_way_is_seen(tmp_path: Path):
    """The owner has sent what it still held, and its kernel has pages on the way that change under it."""
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False, tcp=PATIENT) as reader:
        for nbytes in (MIB, 3 * MIB, ARENA):
            handle = await owner.export(Bytes(nbytes, seed=1))
            async with Cable(handle.params["port"]) as cable:
                cable.hold_after(100_000)
                fetch = asyncio.create_task(outcome(reader, over(cable, handle)))
                await cable.held.wait()
                await owner.release(handle.id)
                again = await owner.export(Bytes(nbytes, seed=2))
                cable.let_go()
                assert await fetch == "generation"
                assert np.array_equal((await fetched(reader, again)).data, Bytes(nbytes, seed=2).data)
                await owner.release(again.id)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("at", [73, 500_000, 2 * MIB + 72])
async def test_a_byte_that_changes_on_its_way_is_found(tmp_path: Path, at: int, verify: bool):
    async with (
        started(tmp_path, verify=verify) as owner,
        started(tmp_path, "decode", exports=False) as reader,
    ):
        handle = await owner.export(Bytes(2 * MIB))
        async with Cable(handle.params["port"]) as cable:
            cable.flip_at = at
            sink = Sink(handle.nbytes)
            with pytest.raises(KVLost) as error:
                await reader.fetch(over(cable, handle), sink)
            assert (error.value.reason, sink.touched) == ("digest", False)
            assert await outcome(reader, over(cable, handle)) == "ok"


async def test_a_closed_owner_ends_what_it_sends(tmp_path: Path):
    async with large(tmp_path, exports=False) as reader, large(tmp_path) as owner:
        handle = await owner.export(Bytes(32 * MIB))
        async with Cable(handle.params["port"]) as cable:
            cable.hold_after(MIB)
            fetch = asyncio.create_task(outcome(reader, over(cable, handle)))
            await cable.held.wait()
            await owner.close()
            cable.let_go()
            assert await fetch == "gone"


async def test_a_closed_reader_ends_what_it_fetches(tmp_path: Path):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False, tcp=PATIENT) as reader:
        handle = await owner.export(Bytes(3 * MIB))
        async with Cable(handle.params["port"]) as cable:
            cable.hold_after(MIB)
            fetches = [asyncio.create_task(reader.fetch(over(cable, handle), Sink(handle.nbytes))) for _ in range(5)]
            await cable.held.wait()
            await reader.close()  # two are being received, three wait for memory
            for fetch in fetches:
                with pytest.raises(TransferError, match="closed"):
                    await fetch


async def test_a_cancelled_fetch_gives_back_its_memory_and_its_connection(tmp_path: Path):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False, tcp=PATIENT) as reader:
        handle = await owner.export(Bytes(ARENA))
        before = sockets()
        async with Cable(handle.params["port"]) as cable:
            for _ in range(5):
                cable.hold_after(MIB)
                fetch = asyncio.create_task(reader.fetch(over(cable, handle), Sink(ARENA)))
                await cable.held.wait()
                fetch.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await fetch
                cable.cut()
                cable.let_go()
        await until(lambda: sockets() == before)
        assert await asyncio.gather(*(outcome(reader, handle) for _ in range(4))) == ["ok"] * 4


# Connections and memory


async def test_a_connection_is_used_again_and_a_broken_one_replaced(tmp_path: Path):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(100_000))
        async with Cable(handle.params["port"]) as cable:
            for _ in range(5):
                assert await outcome(reader, over(cable, handle)) == "ok"
            assert cable.connections == 1
            cable.cut()
            await until(lambda: not cable.open_lines)
            assert await outcome(reader, over(cable, handle)) == "ok"
            assert cable.connections == 2


async def test_a_refusal_leaves_the_connection_usable(tmp_path: Path):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(100_000))
        async with Cable(handle.params["port"]) as cable:
            assert await outcome(reader, altered(over(cable, handle), generation=9)) == "generation"
            assert await outcome(reader, over(cable, handle)) == "ok"
            assert cable.connections == 1


@pytest.mark.parametrize(("streams", "nbytes", "expected"), [(1, 20 * MIB, 1), (4, 20 * MIB + 3, 4), (4, 9 * MIB, 2)])
async def test_a_large_handle_comes_over_several_connections(tmp_path: Path, streams: int, nbytes: int, expected: int):
    async with large(tmp_path) as owner, large(tmp_path, exports=False, streams=streams) as reader:
        blocks = Bytes(nbytes, seed=5)
        handle = await owner.export(blocks)
        async with Cable(handle.params["port"]) as cable:
            for _ in range(2):
                assert np.array_equal((await fetched(reader, over(cable, handle))).data, blocks.data)
            assert cable.connections == expected


async def test_one_of_several_connections_that_breaks_ends_the_fetch(tmp_path: Path):
    async with large(tmp_path) as owner, large(tmp_path, exports=False) as reader:
        handle = await owner.export(Bytes(20 * MIB))
        async with Cable(handle.params["port"]) as cable:
            assert await outcome(reader, over(cable, handle)) == "ok"
            cable.hold_after(MIB)
            fetch = asyncio.create_task(outcome(reader, over(cable, handle)))
            await cable.held.wait()
            cable.cut_one()
            assert await fetch == "gone"
            cable.let_go()
        assert await outcome(reader, handle) == "ok"


async def test_many_fetches_at_once_take_no_more_memory_than_they_may(tmp_path: Path):
    """While nothing comes, only as many ask as have room for the answer; then all get theirs."""
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False, tcp=PATIENT) as reader:
        handle = await owner.export(Bytes(3 * MIB, seed=3))
        room = PATIENT.staging_bytes // (3 * MIB)
        async with Cable(handle.params["port"]) as cable:
            cable.hold_after(MIB)
            fetches = [asyncio.create_task(fetched(reader, over(cable, handle))) for _ in range(30)]
            await cable.held.wait()
            for _ in range(50):
                await asyncio.sleep(0)
            assert cable.connections <= room == 2
            cable.let_go()
            for sink in await asyncio.gather(*fetches):
                assert np.array_equal(sink.data, Bytes(3 * MIB, seed=3).data)
            assert cable.connections <= room
        assert reader.stats().fetched["tcp"].handles == 30


async def test_what_is_larger_than_the_memory_for_it_is_gone(tmp_path: Path):
    small = TcpSettings(staging_bytes=2 * SLAB)
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False, tcp=small) as reader:
        assert await outcome(reader, await owner.export(Bytes(2 * SLAB))) == "ok"
        assert "transfer.tcp.staging_bytes" in await why(reader, await owner.export(Bytes(2 * SLAB + 1)))


# What start refuses


async def test_a_port_that_is_taken(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        tcp = TcpSettings(port=taken.getsockname()[1])
        with pytest.raises(TransferError, match=rf"transfer.tcp.port = {tcp.port}.*in use"):
            async with started(tmp_path, tcp=tcp):
                pass
    assert list(tmp_path.iterdir()) != []
    async with started(tmp_path, "next"):  # what the failed start had taken goes with the next start
        assert len(list(tmp_path.iterdir())) <= 2


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host", "x" * 100])
async def test_an_address_that_is_not_of_this_host(tmp_path: Path, host: str):
    with pytest.raises(TransferError, match=r"transfer.tcp.host"):
        async with started(tmp_path, tcp=TcpSettings(host=host)):
            pass


async def test_the_port_and_the_address_that_were_asked_for(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with started(tmp_path, tcp=TcpSettings(port=port, host="localhost", advertise="127.0.0.2")) as owner:
        handle = await owner.export(Bytes(10))
        assert (handle.params["port"], handle.params["host"]) == (port, "127.0.0.2")
        assert await outcome(owner, altered(handle, host="127.0.0.1")) == "ok"
