"""One answer to several requests: what becomes of those that it leaves."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from api.batched import BatchedAnswer
from api.drain import Drain
from api.metrics import Metrics
from api.service import Service
from pipeline.config import ApiSettings
from pipeline.errors import RequestFailed
from pipeline.pools import ServedPool
from pipeline.preprocess import Preprocessor
from pipeline.protocol import TokenItem, pack_tokens
from tests import texts
from tests.system import request
from tests.unit.test_stream import Store, item, open_stream


async def test_a_request_whose_stream_diverged_is_left_though_its_stream_has_ended() -> None:
    """It ended for this reader alone: nobody else would end it."""
    store = Store()
    stream = open_stream(store, request=request(3, n=2))
    stream.feed(item(0, 0, 3))
    stream.feed(TokenItem("r", 0, 1, pack_tokens([1000])))
    assert stream.has_diverged

    async def opening() -> Any:
        return stream

    async def receive() -> Any:
        await asyncio.Event().wait()  # the client stays

    preprocessor = Preprocessor(
        texts.tokenizer("byte_level"), model="m", max_model_len=9, default_max_tokens=9, max_choices=2
    )
    pool = ServedPool("m", preprocessor, cast(Any, None), 0)
    answer = BatchedAnswer(Service(ApiSettings(), {"m": pool}, Drain(1), Metrics()), pool, [opening])
    with pytest.raises(RequestFailed, match="stream_diverged"):
        await answer({"type": "http"}, receive, cast(Any, None))
    assert len(store.cancelled) == 1
