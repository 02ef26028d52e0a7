"""The engine's process. `ChildEngine` is the parent's side: the engine contract over a socket pair.

The engine computes in a child because one long call that holds the interpreter's lock stops every thread, and leases must be
renewed all the same. The child is spawned (never forked: engines own threads and devices) and dies with its parent.
Run as `python -m workers.child FD PARENT_PID` by `ChildEngine.start` only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import msgspec
import structlog

from pipeline import errors
from pipeline.config import EngineSettings, LogSettings, PoolSettings, TransferSettings
from pipeline.errors import BatonError, EngineDied, EngineDown, KVLost
from pipeline.kv_events import KVEvent
from pipeline.labels import log_fields
from pipeline.processes import ending
from pipeline.protocol import BackendInput, KVHandle, LLMEngineOutput, Log
from workers import messages as m
from workers.engine import (
    AsyncEngine,
    EmbeddingEngine,
    EngineInfo,
    EngineStats,
    Prefilled,
    load_embedding_engine,
    load_engine,
)
from workers.transfer import load_transfer

STATS_S = 0.25
ENDS_WITHIN_S = 1.0  # after its line

Engine = AsyncEngine | EmbeddingEngine


class ChildEngine:
    """`AsyncEngine` or `EmbeddingEngine` in a child process. After `EngineDied` it can be started again."""

    def __init__(
        self, owner: str, pool: PoolSettings, engine: EngineSettings, transfer: TransferSettings, *,
        exports: bool, embeds: bool = False,
    ) -> None:  # fmt: skip
        self._start = m.Start(owner, pool, engine, transfer, exports, embeds)
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._calls: dict[int, asyncio.Future[m.CallAnswer]] = {}
        self._numbers = itertools.count(1)
        self._steps: asyncio.Queue[list[LLMEngineOutput] | EngineDied] = asyncio.Queue()
        self._kv_events: asyncio.Queue[list[KVEvent]] = asyncio.Queue()
        self._started: asyncio.Future[EngineInfo] | None = None
        self.heard_s = 0.0  # monotonic time of the child's last message

    @property
    def info(self) -> EngineInfo:
        """Known after `start`."""
        assert self._info is not None
        return self._info

    @property
    def is_reachable(self) -> bool:
        """Whether the child can be told anything: it has started, and the line to it stands."""
        return self._writer is not None and not self._writer.is_closing()

    @property
    def pid(self) -> int:
        """The child's process id; 0 while there is none."""
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Spawn the child and wait until its engine is up. Raises what the engine raised, or `EngineDied`."""
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            command = [sys.executable, "-m", "workers.child", str(fd), str(os.getpid())]
            # a thread would not do: the kernel ends the child when the thread that made it ends
            self._process = subprocess.Popen(command, pass_fds=(fd,))  # noqa: ASYNC220
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=m.MAX_MESSAGE_BYTES)
        self._steps = asyncio.Queue()
        self._started = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read(reader, self._process), name="engine child")
        self._send(self._start)
        self._info = await self._started

    async def prefill(self, request: BackendInput, done: Log) -> Prefilled:
        """See `AsyncEngine.prefill`."""
        answer = await self._call(request.request_id, lambda call: m.Prefill(call, request, done))
        assert isinstance(answer, m.PrefillAnswer)
        return answer.prefilled

    async def decode(self, request: BackendInput, kv: KVHandle | None, done: Log) -> int:
        """See `AsyncEngine.decode`."""
        answer = await self._call(request.request_id, lambda call: m.Decode(call, request, kv, done))
        assert isinstance(answer, m.DecodeAnswer)
        return answer.cached_tokens

    async def embed(self, request_id: str, sequences: list[list[int]], dimensions: int | None) -> list[bytes]:
        """See `EmbeddingEngine.embed`."""
        answer = await self._call(request_id, lambda call: m.Embed(call, request_id, sequences, dimensions))
        assert isinstance(answer, m.EmbedAnswer)
        return answer.vectors

    async def _call(self, request_id: str, message: object) -> m.CallAnswer:
        call = next(self._numbers)
        future: asyncio.Future[m.CallAnswer] = asyncio.get_running_loop().create_future()
        self._calls[call] = future
        try:
            self._send(message(call))  # type: ignore[operator]
            return await future  # ends with the answer or the child; a hung child is the worker's stall check
        except asyncio.CancelledError:
            with contextlib.suppress(EngineDied):
                self._send(m.Cancel(request_id, None))
            if future.done() and not future.cancelled() and future.exception() is None:
                self._free_unheard(future.result())  # it came in the moment of the cancellation
            raise
        finally:
            self._calls.pop(call, None)

    async def steps(self) -> AsyncIterator[list[LLMEngineOutput]]:
        """See `AsyncEngine.steps`. Raises `EngineDied` when the child ends."""
        while True:
            item = await self._steps.get()
            if isinstance(item, EngineDied):
                raise item
            yield item

    async def kv_events(self) -> AsyncIterator[list[KVEvent]]:
        """See `AsyncEngine.kv_events`. Goes on when the child is started again."""
        while True:
            yield await self._kv_events.get()

    async def cancel(self, request_id: str, choice: int | None = None) -> None:
        """See `AsyncEngine.cancel`."""
        with contextlib.suppress(EngineDied):  # a dead child runs nothing
            self._send(m.Cancel(request_id, choice))

    async def release(self, handle_id: str) -> None:
        """See `AsyncEngine.release`."""
        with contextlib.suppress(EngineDied):
            self._send(m.Release(handle_id))

    def stats(self) -> EngineStats:
        """The figures that the child sent last."""
        return self._stats

    def is_busy(self) -> bool:
        """Whether the child has something to compute, as far as it has said."""
        return bool(self._calls) or self._stats.running + self._stats.waiting > 0

    async def close(self) -> None:
        """Ask the child to close and wait; kill it when it takes longer than 10 s. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(EngineDied):
            self._send(m.Close())
        try:
            await asyncio.to_thread(process.wait, 10)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        await self._stop_reading()

    async def kill(self) -> None:
        """End a stalled child: dump its stacks to stderr, then SIGKILL."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(0.2)
            process.kill()
        await asyncio.to_thread(process.wait)
        await self._stop_reading()

    async def _stop_reading(self) -> None:
        if self._reading is not None:
            await asyncio.wait([self._reading], timeout=2)
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()

    def _send(self, message: msgspec.Struct) -> None:
        if self._writer is None or not self.is_reachable:
            raise EngineDown("the engine's process is down; its tasks are handed back")
        m.send(self._writer, message)

    async def _read(self, reader: asyncio.StreamReader, process: subprocess.Popen[bytes]) -> None:
        decode = msgspec.msgpack.Decoder(m.FromChild).decode
        try:
            while True:
                self._take(decode(await m.receive(reader)))
                self.heard_s = time.monotonic()
        except (asyncio.IncompleteReadError, ConnectionError):
            self._hang_up()
            self._died(f"the engine's process {await _how_it_ended(process)}")
        except Exception as error:  # noqa: BLE001  # nothing after it can be understood: better no engine than a deaf one
            self._died(f"the engine's process sent what cannot be read: {error}")

    def _take(self, message: m.FromChild) -> None:
        match message:
            case m.Step():
                self._steps.put_nowait(message.outputs)
            case m.CacheNews():
                self._kv_events.put_nowait(message.events)
            case m.Stats():
                self._stats = message.stats
            case m.PrefillAnswer() | m.DecodeAnswer() | m.EmbedAnswer():
                if (future := self._calls.get(message.call)) and not future.done():
                    future.set_result(message)
                else:
                    self._free_unheard(message)
            case m.Failed():
                future_ = self._started if message.call == 0 else self._calls.get(message.call)
                if future_ is not None and not future_.done():
                    future_.set_exception(_error(message))
            case m.Started():
                self._stats = message.stats
                if self._started is not None and not self._started.done():
                    self._started.set_result(message.info)

    def _free_unheard(self, answer: m.CallAnswer) -> None:
        """Nobody waits for this answer any more: nobody else will ever free the blocks that it exported."""
        if isinstance(answer, m.PrefillAnswer) and answer.prefilled.kv is not None:
            with contextlib.suppress(EngineDied):
                self._send(m.Release(answer.prefilled.kv.id))

    def _hang_up(self) -> None:
        """From now on the child is not reachable."""
        if self._writer is not None:
            self._writer.close()

    def _died(self, why: str) -> None:
        error = EngineDied(f"{why}; its tasks are handed back")
        self._hang_up()
        for future in (self._started, *self._calls.values()):
            if future is not None and not future.done():
                future.set_exception(error)
        self._steps.put_nowait(error)


async def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    """Its line has ended, so the process is at its end, too; the kernel says a moment later how."""
    try:
        return ending(await asyncio.to_thread(process.wait, ENDS_WITHIN_S))
    except subprocess.TimeoutExpired:
        return "has closed its line and goes on"


def _error(failed: m.Failed) -> BatonError:
    if failed.error == "KVLost":
        return KVLost(failed.message, reason=failed.reason)
    kind = getattr(errors, failed.error, None)
    if isinstance(kind, type) and issubclass(kind, errors.EngineError | errors.TransferError | errors.WireError):
        return kind(failed.message)
    return errors.EngineError(f"{failed.error}: {failed.message}")


# -- the child's side -----------------------------------------------------------------------------------------------------


class _Host:
    """Serves one engine over one socket until it is told to close or its parent is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._running: set[asyncio.Task[None]] = set()
        self._inbox: asyncio.Queue[m.ToChild] = asyncio.Queue()

    async def serve(self) -> int:
        start = msgspec.msgpack.decode(await m.receive(self._reader), type=m.Start)
        reading = asyncio.create_task(self._read())
        try:
            return await self._serve(start, reading)
        finally:
            reading.cancel()

    async def _serve(self, start: m.Start, reading: asyncio.Task[None]) -> int:
        starting = asyncio.create_task(_start_engine(start))
        await asyncio.wait([starting, reading], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():  # told to close before the engine was up: it gives back what it has taken
            starting.cancel()
            await asyncio.wait([starting])
            if not starting.cancelled() and starting.exception() is None:
                await starting.result().close()
            return 0
        try:
            engine = starting.result()
        except Exception as error:  # noqa: BLE001  # whatever it is, the parent must hear it before this process ends
            m.send(self._writer, _failed(0, error))
            await self._writer.drain()
            return 1
        m.send(self._writer, m.Started(engine.info, engine.stats()))
        pumps = [asyncio.create_task(self._pump_steps(engine)), asyncio.create_task(self._pump_stats(engine))]
        self._keep(asyncio.create_task(self._pump_kv_events(engine)))
        commands = asyncio.create_task(self._take_commands(engine))
        done, _ = await asyncio.wait([*pumps, commands], return_when=asyncio.FIRST_COMPLETED)
        for task in [*pumps, commands, *self._running]:
            task.cancel()
        await engine.close()
        for task in (*done, *([reading] if reading.done() else [])):
            if (error_ := task.exception()) is not None:
                print(f"engine: {type(error_).__name__}: {error_}", file=sys.stderr, flush=True)  # noqa: T201
                return 1
        return 0

    async def _read(self) -> None:
        """Returns when this process is told to close or its parent is gone; also while the engine starts."""
        decode = msgspec.msgpack.Decoder(m.ToChild).decode
        message = None
        try:
            while not isinstance(message, m.Close):
                message = decode(await m.receive(self._reader))
                self._inbox.put_nowait(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the parent is gone
        finally:
            self._inbox.put_nowait(m.Close())

    async def _take_commands(self, engine: Engine) -> None:
        while True:
            message = await self._inbox.get()
            match message:
                case m.Prefill() | m.Decode() | m.Embed():
                    task = asyncio.create_task(self._answer(engine, message))
                    self._keep(task)
                    await asyncio.sleep(0)  # it is in the engine before a cancellation that lies behind it is read
                case m.Cancel():
                    await engine.cancel(message.request_id, message.choice)
                case m.Release():
                    await engine.release(message.handle_id)
                    m.send(self._writer, m.Stats(engine.stats()))
                case m.Close() | m.Start():
                    return

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer(self, engine: Engine, message: m.Prefill | m.Decode | m.Embed) -> None:
        answer: m.CallAnswer | m.Failed
        if not isinstance(message, m.Embed):
            structlog.contextvars.bind_contextvars(**log_fields(message.request))  # of this call's task alone
        try:
            if isinstance(engine, EmbeddingEngine):
                assert isinstance(message, m.Embed)
                vectors = await engine.embed(message.request_id, message.sequences, message.dimensions)
                answer = m.EmbedAnswer(message.call, vectors)
            elif isinstance(message, m.Prefill):
                answer = m.PrefillAnswer(message.call, await engine.prefill(message.request, message.done))
                m.send(self._writer, m.Stats(engine.stats()))  # what it exported counts before the next claim
            else:
                assert isinstance(message, m.Decode)
                answer = m.DecodeAnswer(message.call, await engine.decode(message.request, message.kv, message.done))
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # the parent classifies it
            answer = _failed(message.call, error)
        m.send(self._writer, answer)

    async def _pump_steps(self, engine: Engine) -> None:
        async for outputs in engine.steps():
            m.send(self._writer, m.Step(outputs))
            await self._writer.drain()

    async def _pump_kv_events(self, engine: Engine) -> None:
        async for events in engine.kv_events():
            m.send(self._writer, m.CacheNews(events))

    async def _pump_stats(self, engine: Engine) -> None:
        while True:
            m.send(self._writer, m.Stats(engine.stats()))
            await asyncio.sleep(STATS_S)


async def _start_engine(start: m.Start) -> Engine:
    engine: Engine
    if start.embeds:
        engine = load_embedding_engine(start.pool, start.engine)
    else:
        transfer = load_transfer(start.transfer, start.owner, exports=start.exports)
        engine = load_engine(start.pool, start.engine, transfer)
    try:
        await engine.start()
    except BaseException:
        await engine.close()
        raise
    return engine


def _failed(call: int, error: BaseException) -> m.Failed:
    return m.Failed(call, type(error).__name__, str(error), error.reason if isinstance(error, KVLost) else "")


async def _child_main(fd: int) -> int:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd), limit=m.MAX_MESSAGE_BYTES)
    return await _Host(reader, writer).serve()


def main() -> None:
    """Entry of the child process."""
    import faulthandler

    from pipeline.logs import configure
    from pipeline.processes import die_with_parent

    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):  # a terminal sends them to the whole group:
        signal.signal(number, signal.SIG_IGN)  # the parent drains and closes this process
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    configure(LogSettings(), "engine")
    sys.exit(asyncio.run(_child_main(fd)))


if __name__ == "__main__":
    main()
