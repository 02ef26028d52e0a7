"""Bodies of `/v1/embeddings`: their inputs, and what of them a pool can serve."""

from __future__ import annotations

from typing import Literal

import msgspec

from pipeline.embeddings import MOST_INPUTS, Offer
from pipeline.errors import InvalidRequest
from pipeline.features import EMBEDDINGS, is_served
from pipeline.pools import ServedPool
from pipeline.surface.bodies import decoded
from pipeline.surface.fields import Count, Priority, ServiceTier

Input = str | list[str | int | list[int]]


class EmbeddingBody(msgspec.Struct, kw_only=True):
    """The body of /v1/embeddings. `input`: a text, token ids, or a list of several of one of these."""

    model: str
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None
    priority: Priority | None = None
    service_tier: ServiceTier | None = None


_decoder = msgspec.json.Decoder(EmbeddingBody)


def embedding_body(raw: bytes) -> EmbeddingBody:
    """Decode and check the body. Raises InvalidRequest with the path of the first thing that is wrong."""
    body: EmbeddingBody = decoded(_decoder, raw)
    return body


def several(given: Input) -> list[tuple[str, str | list[int]]]:
    """Each input with its path in the body. Raises InvalidRequest for none, for too many, and for a mixture."""
    if isinstance(given, str) or (given and type(given[0]) is int):
        return [("input", given if isinstance(given, str) else _ids(given))]
    if not given:
        raise InvalidRequest("input is empty: there is nothing to embed", param="input")
    if len(given) > MOST_INPUTS:
        raise InvalidRequest(f"input has {len(given)} inputs, at most {MOST_INPUTS} are taken", param="input")
    kind = type(given[0])
    found: list[tuple[str, str | list[int]]] = []
    for position, one in enumerate(given):
        if type(one) is not kind or isinstance(one, int):
            raise InvalidRequest("input is a list of texts or of lists of token ids", param=f"input[{position}]")
        found.append((f"input[{position}]", one))
    return found


def _ids(given: list[str | int | list[int]]) -> list[int]:
    for position, one in enumerate(given):
        if not isinstance(one, int):
            raise InvalidRequest("input is a list of token ids, this is none", param=f"input[{position}]")
    return [one for one in given if isinstance(one, int)]


def offered(pool: ServedPool, model: str) -> Offer:
    """What the pool gives. Raises InvalidRequest where it makes no embeddings, saying why."""
    if not is_served(pool.engine, EMBEDDINGS):
        why = f"its engine, {pool.engine}, does not serve them"
    elif pool.embeddings is None:
        why = f"pools.{pool.name}.embeddings is false"
    else:
        return pool.embeddings
    raise InvalidRequest(f"model {model!r} makes no embeddings: {why}", param="model", code="unsupported_parameter")


def dimensions_of(body: EmbeddingBody, offer: Offer) -> int | None:
    """How many numbers a vector is cut to; None: it is not. Raises InvalidRequest."""
    asked = body.dimensions
    if asked is None or asked == offer.width:
        return None
    if not offer.is_matryoshka:
        raise InvalidRequest(
            f"model {body.model!r} makes vectors of one length"
            f"{f', {offer.width}' if offer.width else ''}: it does not support dimensions (pools.<name>.matryoshka)",
            param="dimensions",
            code="unsupported_parameter",
        )
    if offer.width is not None and asked > offer.width:
        raise InvalidRequest(
            f"model {body.model!r} makes vectors of {offer.width} numbers, {asked} are asked for", param="dimensions"
        )
    return asked


def token_ids(pool: ServedPool, named: list[tuple[str, str | list[int]]]) -> list[list[int]]:
    """The tokens of each input. Raises InvalidRequest with its path."""
    return [pool.preprocessor.embedding(one, param) for param, one in named]
