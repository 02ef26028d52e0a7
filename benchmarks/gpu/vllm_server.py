"""One engine of plain vLLM behind as little HTTP as the load needs: what Baton is compared with.

`python -m benchmarks.gpu.vllm_server PORT ENGINE_ARGUMENTS_JSON`: `POST /v1/completions` with token ids streams token ids, or answers at
once with the `kv_transfer_params` of vLLM's connector.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import uvloop
from vllm import AsyncEngineArgs, SamplingParams
from vllm.config import KVTransferConfig
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


class Server:
    """Serves one `AsyncLLM`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._serial = itertools.count()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if head.startswith(b"get"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
            request = msgspec.json.decode(await reader.readexactly(length))
            writer.write(HEAD)
            parts = self._stream(request) if request["stream"] else self._whole(request)
            async for part in parts:
                writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    async def _stream(self, request: dict[str, Any]) -> AsyncIterator[bytes]:
        async for output in self._generate(request, RequestOutputKind.DELTA):
            (choice,) = output.outputs
            said = {"index": 0, "text": "", "token_ids": list(choice.token_ids), "finish_reason": choice.finish_reason}
            yield b"data: " + msgspec.json.encode({"choices": [said]}) + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def _whole(self, request: dict[str, Any]) -> AsyncIterator[bytes]:
        async for output in self._generate(request, RequestOutputKind.FINAL_ONLY):
            token_ids = list(output.outputs[0].token_ids)
            yield msgspec.json.encode(
                {"choices": [{"token_ids": token_ids}], "kv_transfer_params": output.kv_transfer_params}
            )

    def _generate(self, request: dict[str, Any], kind: RequestOutputKind) -> AsyncIterator[Any]:
        handle = request.get("kv_transfer_params")
        params = SamplingParams(
            temperature=request["temperature"], max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False,
            output_kind=kind, extra_args={"kv_transfer_params": handle} if handle else None,
        )  # fmt: skip
        prompt: Any = {"prompt_token_ids": request["prompt"]}
        return self._engine.generate(prompt, params, f"bench-{next(self._serial)}")


async def serve(port: int, arguments: dict[str, Any]) -> None:
    """Until the process is ended."""
    if "kv_transfer_config" in arguments:
        arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    server = await asyncio.start_server(Server(engine).answer, "127.0.0.1", port, limit=1 << 22)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), json.loads(sys.argv[2])))
