"""What `/v1/embeddings` answers."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import msgspec
import numpy as np


def embeddings_body(model: str, vectors: Sequence[bytes], prompt_tokens: int, *, as_base64: bool) -> bytes:
    """The body. `vectors`: little-endian float32, in the order of the inputs."""
    to_json, encode = _as_base64 if as_base64 else as_floats, msgspec.json.Encoder().encode
    data = [  # one at a time: the interpreter's lock is held for as long as one call encodes
        msgspec.Raw(encode({"object": "embedding", "index": index, "embedding": to_json(vector)}))
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return encode({"object": "list", "data": data, "model": model, "usage": usage})


def as_floats(vector: bytes) -> list[float]:
    """The numbers of little-endian float32."""
    numbers: list[float] = np.frombuffer(vector, dtype="<f4").tolist()
    return numbers


def _as_base64(vector: bytes) -> str:
    """The same bytes, as OpenAI's clients ask for them."""
    return base64.b64encode(vector).decode()
