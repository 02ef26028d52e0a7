"""Embeddings and models."""

from __future__ import annotations

import base64
import struct
from typing import Any

from openai.types import CreateEmbeddingResponse, Embedding, Model
from pydantic import BaseModel

from tests.openai_types import strictly
from tests.surface.matrix.case import THINKER, Answer, Case
from tests.system import POOL

PATH = "/v1/embeddings"
WIDTH = 256


class CodedEmbedding(Embedding):
    """OpenAI's type has the vector as its client decodes it; on the way it is base64."""

    embedding: str  # type: ignore[assignment]


class CodedEmbeddings(CreateEmbeddingResponse):
    """An answer in base64."""

    data: list[CodedEmbedding]  # type: ignore[assignment]


class Models(BaseModel):
    """The page that OpenAI's client reads; its own type is bound to the client."""

    object: str
    data: list[Model]


INPUTS: dict[str, Any] = {
    "text": "A runner.",
    "texts": ["A runner.", "The baton.", "🙂 漢字"],
    "list-of-one": ["A runner."],
    "ids": [301, 302, 303],
    "lists-of-ids": [[301, 302], [303]],
    "same-twice": ["A runner.", "A runner."],
}
FIELDS: dict[str, dict[str, Any]] = {
    "default": {},
    "float": {"encoding_format": "float"},
    "base64": {"encoding_format": "base64"},
    "dimensions-16": {"dimensions": 16},
    "dimensions-base64": {"dimensions": 32, "encoding_format": "base64"},
    "whole-dimensions": {"dimensions": WIDTH},
    "user": {"user": "u", "service_tier": "default"},
    "flex": {"service_tier": "flex"},
    "priority": {"priority": -1},
}


def check_embeddings(answer: Answer) -> None:
    """A vector of length 1 for each input."""
    asked = answer.case.asked
    is_coded = asked.get("encoding_format") == "base64"
    strictly(CodedEmbeddings if is_coded else CreateEmbeddingResponse, answer.json)
    given = asked["input"]
    count = len(given) if isinstance(given, list) and not isinstance(given[0], int) else 1
    assert [item["index"] for item in answer.json["data"]] == list(range(count))
    for item in answer.json["data"]:
        data = base64.b64decode(item["embedding"]) if is_coded else b""
        vector = struct.unpack(f"<{len(data) // 4}f", data) if is_coded else item["embedding"]
        assert len(vector) == asked.get("dimensions", WIDTH)
        assert abs(sum(number * number for number in vector) - 1) < 1e-4
    usage = answer.json["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] > 0
    assert answer.json["model"] == POOL


def check_models(answer: Answer) -> None:
    strictly(Models, answer.json)
    assert {model["id"] for model in answer.json["data"]} == {POOL, THINKER}


def check_model(answer: Answer) -> None:
    strictly(Model, answer.json)
    assert answer.case.path.endswith(answer.json["id"])


CASES: list[Case] = [
    *(
        Case(
            id=f"embedding/{name}/{way}", path=PATH, check=check_embeddings, body={"model": POOL, "input": value, **fields}
        )
        for name, value in INPUTS.items()
        for way, fields in FIELDS.items()
        if way == "default" or name in ("text", "texts")
    ),
    Case(id="models/list", path="/v1/models", method="GET", check=check_models),
    *(Case(id=f"models/{name}", path=f"/v1/models/{name}", method="GET", check=check_model) for name in (POOL, THINKER)),
]  # fmt: skip
