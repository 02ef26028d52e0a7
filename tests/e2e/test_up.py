"""`baton up` as a user runs it: real processes, a real Redis of its own, real signals."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.texts import byte_level

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 90


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mock engine makes up token ids; this tokenizer makes text of them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level().save_pretrained(folder)
    return folder


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    """A folder of shared memory of this test's own, so that what is left in it can be seen."""
    folder = Path(tempfile.mkdtemp(prefix="baton-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def settings(short_dir: Path, shared_memory: Path, tokenizer_dir: Path) -> list[str]:
    keys = {
        "redis.run_dir": short_dir / "run",
        "transfer.dir": shared_memory,
        "transfer.arena_bytes": 16 * 2**20,
        "pools.baton-tiny.engine": "mock",
        "pools.baton-tiny.tokenizer": tokenizer_dir,
        "engine.mock.vocab_size": 600,
        "engine.mock.decode_base_ms": 2,
        "worker.lease_s": 3,
    }
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


class Up:
    """A running `baton up` and what it printed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = ""
        self._grown = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while data := await self.process.stdout.read(65536):
            async with self._grown:
                self.output += data.decode(errors="replace")
                self._grown.notify_all()

    async def says(self, pattern: str) -> re.Match[str]:
        """Waits until the output matches; fails when it has ended without."""
        match = None
        async with asyncio.timeout(LIMIT_S), self._grown:
            while (match := re.search(pattern, self.output)) is None:
                if self._reader.done():
                    pytest.fail(f"ended without saying {pattern!r}:\n{self.output}")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await self._grown.wait()
        return match

    async def ended(self) -> int:
        async with asyncio.timeout(LIMIT_S):
            code = await self.process.wait()
            await self._reader
        return code

    @property
    def family(self) -> list[psutil.Process]:
        """Every process that it started, and those that they started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, words: str) -> psutil.Process:
        """The one process whose command line has `words`."""
        (found,) = [one for one in self.family if words in " ".join(one.cmdline())]
        return found


@contextlib.asynccontextmanager
async def command(*words: str) -> AsyncIterator[Up]:
    """`baton WORDS`; it is killed at the end if it has not left by then, and what it started ends with it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pipeline.cli", *words,
        cwd=REPOSITORY, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    running = Up(process)
    try:
        yield running
    finally:
        family: list[psutil.Process] = []
        if process.returncode is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = running.family
            process.kill()
        await running.ended()
        # they end because it did: Redis, with its socket, only after it
        await asyncio.to_thread(psutil.wait_procs, family, timeout=LIMIT_S)


@contextlib.asynccontextmanager
async def up(*words: str, port: int = 0) -> AsyncIterator[Up]:
    async with command("up", "--port", str(port), *words) as running:
        yield running


async def run(*command: str) -> tuple[int, str]:
    """Runs a command; returns its exit code and what it printed on stdout."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(LIMIT_S):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace")


def left_over(family: list[psutil.Process]) -> list[psutil.Process]:
    """Which of the processes did not end; one that only waits to be reaped by the machine's first process has ended."""
    _, alive = psutil.wait_procs(family, timeout=3)
    return [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


async def test_up_proves_itself_serves_and_leaves_nothing_behind(settings, short_dir, shared_memory):
    async with up(*settings) as running:
        # Given a sample answer that came through the real endpoint
        await running.says("serving; Ctrl-C stops everything in order")
        sample = re.search(r'asking baton-tiny: "What is Baton\?"\n\n  (.+)\n\n', running.output, re.DOTALL)
        assert sample and len(sample[1]) > 20
        assert re.search(r"first token after \d+ ms", running.output)

        # When the printed line is pasted into a shell
        curl = re.search(r"\n  (curl .+)\n", running.output)
        assert curl
        code, answer = await run("bash", "-c", curl[1])

        # Then it streams a whole answer
        assert code == 0
        assert '"object":"chat.completion.chunk"' in answer.replace(" ", "")
        assert answer.rstrip().endswith("data: [DONE]")

        # And chat says where the time went
        port = (await running.says(r"http://127\.0\.0\.1:(\d+)"))[1]
        words = ("chat", "hello", "--max-tokens", "20", "--set", f"api.port={port}", *settings)
        code, answer = await run(sys.executable, "-m", "pipeline.cli", *words)
        assert code == 0
        line = r"queue [\d.]+ ms · prefill [\d.]+ ms · transfer [\d.]+ ms · first token [\d.]+ ms · \d+ tok/s\n$"
        assert re.search(line, answer), answer

        # When it is told to stop
        family = running.family
        running.process.send_signal(signal.SIGINT)

        # Then it leaves in order and leaves nothing
        assert await running.ended() == 0
        assert running.output.rstrip().endswith("stopped")
        assert left_over(family) == []
        assert sorted(path.name for path in (short_dir / "run").iterdir()) == ["lock", "redis", "redis.log"]
        assert list(shared_memory.iterdir()) == []


async def test_a_stream_that_runs_at_ctrl_c_is_finished(settings):
    async with up(
        "--no-sample", *settings, "--set", "engine.mock.decode_base_ms=20", "--set", "worker.lease_s=60"
    ) as running:
        await running.says("serving; Ctrl-C")
        url = (await running.says(r"http://127\.0\.0\.1:\d+"))[0]
        body = {
            "model": "baton-tiny",
            "stream": True,
            "max_tokens": 60,
            "messages": [{"role": "user", "content": "hi"}],
        }
        async with (
            httpx.AsyncClient(timeout=LIMIT_S) as http,
            http.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
        ):
            lines = response.aiter_lines()
            while "content" not in await anext(lines):
                pass
            running.process.send_signal(signal.SIGTERM)
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in "".join(rest).replace(" ", "")
        assert await running.ended() == 0


async def test_what_dies_is_started_again_and_said_so(settings):
    async with up("--no-sample", *settings) as running:
        await running.says("serving; Ctrl-C")
        url = (await running.says(r"http://127\.0\.0\.1:\d+"))[0]

        # When a batch worker, a decode worker, the API and Redis are killed, one after the other
        running.child("-m workers batch").kill()
        await running.says(r"batch-0 was ended by SIGKILL: starting it again in 0\.5 s")
        running.child("-m workers decode").kill()
        await running.says(r"decode-0 was ended by SIGKILL: starting it again in 0\.5 s")
        running.child("-m api").kill()
        await running.says(r"api was ended by SIGKILL: starting it again in 0\.5 s")
        running.child("redis-server").kill()
        await running.says(r"Redis was ended by SIGKILL: starting it again in 0\.5 s; requests wait")

        # Then requests are answered again
        assert await answered(url) == 5
        running.process.send_signal(signal.SIGTERM)
        assert await running.ended() == 0


async def answered(url: str) -> int:
    """The tokens of an answer, once there is one again."""
    prompt = {"model": "baton-tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    async with asyncio.timeout(LIMIT_S), httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as http:
        while True:
            with contextlib.suppress(httpx.TransportError):
                response = await http.post("/v1/chat/completions", json=prompt)
                if response.status_code == httpx.codes.OK:
                    return int(response.json()["usage"]["completion_tokens"])


async def test_a_redis_that_cannot_be_started_again_at_once_is_tried_again(settings, short_dir):
    async with up("--no-sample", *settings) as running:
        await running.says("serving; Ctrl-C")
        url = (await running.says(r"http://127\.0\.0\.1:\d+"))[0]
        with (short_dir / "run" / "lock").open() as lock:
            # Given that somebody else has the folder as soon as Redis has ended
            taking = asyncio.create_task(asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX))
            running.child("redis-server").kill()
            await taking
            await running.says(
                r"Redis cannot be started \([^\n]* is in use by [^\n]*\): trying again in 1 s; requests wait"
            )

        # Then it is started when the folder is free
        assert await answered(url) == 5
        running.process.send_signal(signal.SIGTERM)
        assert await running.ended() == 0


async def test_a_stream_goes_on_when_its_worker_is_killed_long_before_the_lease_runs_out(settings):
    async with up(
        "--no-sample", *settings, "--set", "engine.mock.decode_base_ms=20", "--set", "worker.lease_s=60"
    ) as running:
        await running.says("serving; Ctrl-C")
        url = (await running.says(r"http://127\.0\.0\.1:\d+"))[0]
        body = {"model": "baton-tiny", "prompt": [5] * 40, "max_tokens": 120, "temperature": 0}
        async with asyncio.timeout(LIMIT_S), httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as http:
            undisturbed = (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"]
            asking = asyncio.create_task(http.post("/v1/completions", json=body))
            await running.says(r"Task decode\[[^\n]* received[\s\S]*Task decode\[[^\n]* received")
            running.child("-m workers decode").kill()
            await running.says("held 1 task: waiting for another worker")
            answer = (await asking).json()
        assert answer["choices"][0]["text"] == undisturbed
        assert answer["usage"]["completion_tokens"] == 120
        running.process.send_signal(signal.SIGTERM)
        assert await running.ended() == 0


async def test_a_batch_goes_on_when_its_worker_is_killed_long_before_the_lease_runs_out(settings, short_dir):
    slow = {
        "engine.mock.decode_base_ms": 20, "batches.lease_s": 600, "batches.max_in_flight": 2, "batches.part_lines": 2,
        "files.url": short_dir / "files",
    }  # fmt: skip
    more = [word for key, value in slow.items() for word in ("--set", f"{key}={value}")]
    async with up("--no-sample", *settings, *more) as running:
        await running.says("serving; Ctrl-C")
        url = (await running.says(r"http://127\.0\.0\.1:\d+"))[0]
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            body = {"model": "baton-tiny", "prompt": [5] * 40, "max_tokens": 20}
            lines = [{"custom_id": str(number), "url": "/v1/completions", "body": body} for number in range(20)]
            data = "".join(json.dumps(line) + "\n" for line in lines).encode()
            file = await client.files.create(file=data, purpose="batch")
            made = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
            await running.says("batch begins")
            workers = [one for one in running.family if "-m workers batch" in " ".join(one.cmdline())]
            next(one for one in workers if one.ppid() == running.process.pid).kill()
            await running.says(rf"held {made.id}: waiting for another worker")
            await running.says("batch ended")
            assert (await client.batches.retrieve(made.id)).status == "completed"
        running.process.send_signal(signal.SIGTERM)
        assert await running.ended() == 0


async def test_kill_takes_everything_along_and_the_next_start_cleans_up(settings, shared_memory):
    # Given an `up` that is killed while it serves
    async with up("--no-sample", *settings) as running:
        await running.says("serving; Ctrl-C")
        family = running.family
        running.process.kill()
        await running.ended()

    # Then all of its processes end
    assert left_over(family) == []

    # And the next one starts in the same folder and leaves nothing, of its own or of the other
    async with up("--no-sample", *settings) as running:
        await running.says("serving; Ctrl-C")
        running.process.send_signal(signal.SIGINT)
        assert await running.ended() == 0
    assert list(shared_memory.iterdir()) == []


async def test_a_second_ctrl_c_kills(settings):
    async with up("--no-sample", *settings) as running:
        await running.says("serving; Ctrl-C")
        family = running.family
        running.child("-m api").suspend()  # it will not leave by itself
        running.process.send_signal(signal.SIGINT)
        await running.says("stopping: streams may finish")
        running.process.send_signal(signal.SIGINT)
        assert await running.ended() == 130
        assert running.output.rstrip().endswith("stopped")
        assert left_over(family) == []


async def test_a_worker_that_cannot_start_ends_everything_with_a_clear_line(settings, tmp_path):
    broken = ["--set", "pools.baton-tiny.engine=torch", "--set", f"pools.baton-tiny.model={tmp_path}"]
    async with up(*settings, *broken) as running:
        assert await running.ended() == 1
    assert re.search(
        r"(api|prefill-0|decode-0) ended with code [12] before it was ready: see its lines above", running.output
    )
    assert running.output.rstrip().endswith("stopped")


async def test_a_second_one_in_the_folder_is_refused(settings):
    async with up("--no-sample", *settings) as first:
        await first.says("starting the API")
        async with up("--no-sample", *settings) as second:
            assert await second.ended() == 3
    lines = second.output.splitlines()
    assert re.fullmatch(r"baton +\| .+/run is in use by process \d+ .*: stop it, or choose another folder .*", lines[0])
    assert len(lines) == 2


async def test_ctrl_c_while_it_starts_leaves_nothing_behind(settings, shared_memory):
    async with up("--no-sample", *settings) as running:
        await running.says("engine is up")
        family = running.family
        running.process.send_signal(signal.SIGINT)
        assert await running.ended() == 0
    assert left_over(family) == []
    assert list(shared_memory.iterdir()) == []


async def test_a_redis_of_the_settings_that_does_not_answer_is_told_at_once(settings, short_dir):
    async with up("--redis-url", f"unix://{short_dir}/none.sock", *settings) as running:
        assert await running.ended() == 4
    assert f"Redis at unix://{short_dir}/none.sock does not answer (No such file or directory)" in running.output
    assert "starting the API" not in running.output
