"""The GPU benchmark's load and figures, without a GPU: what is sent, how tokens are counted, what is reported."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks.gpu.figures import figures, itls_s, tpot_s, ttft_s
from benchmarks.gpu.load import Due, Kind, Seen, Target, at_once, plan, run
from benchmarks.gpu.merge import merge
from benchmarks.gpu.shapes import SHAPES

CHAT, LONG = Kind("chat", 8, 4, per_s=20), Kind("long", 64, 2, per_s=2)


def seen(*arrivals: tuple[float, int], asked: int = 4, kind: str = "chat") -> Seen:
    return Seen(kind, asked, due_s=10.0, sent_s=10.001, arrivals=list(arrivals))


def test_a_seed_says_when_and_no_prompt_comes_twice() -> None:
    first, again, other = (plan([CHAT, LONG], 10, 1000, seed) for seed in (1, 1, 2))
    assert [due.at_s for due in first] == [due.at_s for due in again]
    assert [due.at_s for due in first] != [due.at_s for due in other]
    assert 140 < len(first) < 300
    assert [due.at_s for due in first] == sorted(due.at_s for due in first)
    bodies = [json.loads(due.body) for due in first + again]
    assert {(len(body["prompt"]), body["max_tokens"]) for body in bodies} == {(8, 4), (64, 2)}
    assert len({tuple(body["prompt"][:4]) for body in bodies}) == len(bodies)


def test_tokens_that_come_together_have_one_pause() -> None:
    one = seen((10.5, 1), (10.7, 2), (10.8, 1))
    assert ttft_s(one) == pytest.approx(0.5)
    assert itls_s(one) == pytest.approx([0.2, 0.0, 0.1])
    assert tpot_s(one) == pytest.approx(0.1)
    assert itls_s(seen((10.5, 3), (10.6, 1))) == pytest.approx([0.0, 0.0, 0.1])


def test_only_whole_answers_count_and_the_limits_decide_which_are_good() -> None:
    good = seen((10.5, 1), (10.51, 1), (10.52, 1), (10.53, 1))
    late = seen((11.5, 1), (11.51, 1), (11.52, 1), (11.53, 1))
    one_pause = seen((10.5, 1), (10.54, 1), (10.55, 1), (10.56, 1))
    short = seen((10.5, 1), (10.6, 1))
    failed = Seen("chat", 4, 10.0, error="gone")
    row = figures([good, late, one_pause, short, failed], seconds=2.0)
    assert (row["requests"], row["whole"], row["failed"]) == (5, 3, ["2 of 4 tokens", "gone"])
    assert (row["good_by_tpot"], row["good_by_itl_p99"], row["goodput_by_tpot_per_s"]) == (2, 1, 1.0)
    assert row["kinds"]["chat"]["ttft_ms"] == {"p50": 500.0, "p95": 1500.0, "p99": 1500.0, "max": 1500.0}


@asynccontextmanager
async def server(*parts: bytes, status: bytes = b"200 OK") -> AsyncIterator[int]:
    """Answers each request with these chunks."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
        writer.write(b"HTTP/1.1 " + status + b"\r\nX-Baton-Request-Id: Bench-aBc\r\nTransfer-Encoding: chunked\r\n\r\n")
        for part in (*parts, b""):
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


def event(*token_ids: int) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": "", "token_ids": token_ids}]}).encode() + b"\n\n"


async def ask(port: int) -> Seen:
    (one,) = await run(at_once(CHAT, 1, 100), Target((port,)))
    return one


async def test_each_write_of_the_server_is_one_arrival() -> None:
    async with server(event(1) + event(2), b": ping\n" + event(3), event(4) + event() + b"data: [DONE]\n\n") as port:
        one = await ask(port)
    assert [count for _, count in one.arrivals] == [2, 1, 1]
    assert (one.is_whole, one.request_id) == (True, "Bench-aBc")


async def test_what_is_no_answer_is_told() -> None:
    async with server(event(1), b'data: {"error":{"message":"boom"}}\n\n') as port:
        one = await ask(port)
    assert not one.is_whole
    assert "boom" in one.error
    async with server(status=b"503 Service Unavailable") as port:
        assert "503" in (await ask(port)).error


async def test_servers_take_turns() -> None:
    async with server(event(1, 2, 3, 4)) as first, server(event(1, 2)) as second:
        rows = await run([Due(CHAT, 0.0, b"{}")] * 4, Target((first, second)))
    assert [one.tokens for one in rows] == [4, 2, 4, 2]


def test_a_shape_is_a_folder_with_nothing_but_its_configuration(tmp_path: Path) -> None:
    folder = SHAPES["8b"].write(tmp_path / "model")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert SHAPES["8b"].kv_nbytes(8192) == 2**30


def test_configurations_are_merged_into_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = seen((10.5, 1), (10.51, 1), (10.52, 1), (10.53, 1))
    long = seen((10.9, 4), kind="long")
    row = {"rate": "8+1", "max_local": 512, **figures([one, long], seconds=1.0)}
    data = {
        "name": "disagg-shm",
        "handovers": [{"prompt_tokens": 512, "nbytes": 10**6, "export_ms": 1}],
        "rates": [row],
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "disagg-shm.json").write_text(json.dumps(data))
    merge(tmp_path / "results", tmp_path / "all")
    assert json.loads((tmp_path / "all.json").read_text())["runs"] == [data]
    told = capsys.readouterr().out
    assert "| disagg-shm, local to 512 | 8+1 | 500.0 / 500.0 | 10.0 / 10.0 / 10.0 | 900.0 / 900.0 |" in told
    assert "disagg-shm, 512 tokens, 1.0 MB: {'export_ms': 1}" in told
