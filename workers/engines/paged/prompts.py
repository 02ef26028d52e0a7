"""Log probabilities of a prompt's tokens: computed a chunk at a time beside the keys and values, told with the first token.

A request has one `PromptScores` for all its choices. As long as it is not complete the prefix cache is of no use to the request: of what
lies there nobody knows the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.logprobs import prompt_record_bytes
from pipeline.protocol import BackendInput


@dataclass(slots=True, eq=False)
class Asked:
    """What a row is to tell of the prompt: of each token of `targets` the log probability at the row's position `first` and those after
    it, and of the `top` likeliest there. The runner leaves the `records`."""

    first: int
    targets: list[int]
    top: int
    records: bytes = b""


@dataclass(slots=True, eq=False)
class PromptScores:
    """See the module's docstring. `records` grows in order of the prompt, from its second token on."""

    request: BackendInput
    top: int
    record_bytes: int
    records: bytearray = field(default_factory=bytearray)
    is_told: bool = False

    @property
    def known(self) -> int:
        """Positions whose next token has its record."""
        return len(self.records) // self.record_bytes

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to be computed."""
        return self.known == len(self.request.token_ids) - 1

    def ask(self, start: int, end: int) -> Asked | None:
        """What the positions `start` to `end` can tell that is not known; None where that is nothing."""
        start, end = max(start, self.known), min(end, len(self.request.token_ids) - 1)
        if start >= end:
            return None
        return Asked(start, self.request.token_ids[start + 1 : end + 1], self.top)

    def take(self, asked: Asked) -> None:
        """What a row has told."""
        if asked.first == self.known:
            self.records += asked.records

    def tell(self) -> bytes:
        """All records, once, when they are complete."""
        if self.is_told or not self.is_complete:
            return b""
        self.is_told = True
        return bytes(self.records)


def scores_of(request: BackendInput) -> PromptScores | None:
    """What is to be told of a request's prompt; None where nothing is asked."""
    top = request.output_options.prompt_logprobs
    return None if top is None else PromptScores(request, top, prompt_record_bytes(request))


def pack_scores(
    logprobs: NDArray[np.float32], ranks: NDArray[np.int64], ids: NDArray[np.int64], values: NDArray[np.float32]
) -> bytes:
    """The records of tokens with these `logprobs` and `ranks` [tokens], and the likeliest at their places [tokens, top], best first."""
    top = [("id", "<u4"), ("logprob", "<f4")]
    rows = np.empty(
        len(logprobs), dtype=[("known", "u1"), ("logprob", "<f4"), ("rank", "<u4"), ("top", top, (ids.shape[1],))]
    )
    rows["known"], rows["logprob"], rows["rank"] = 1, logprobs, ranks
    rows["top"]["id"], rows["top"]["logprob"] = ids, values
    return rows.tobytes()


def best_of(
    ids: NDArray[np.int64], values: NDArray[np.float32], top: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The `top` likeliest of each row, the best first, of equals the lower id."""
    order = np.lexsort((ids, -values))
    return np.take_along_axis(ids, order, -1)[:, :top], np.take_along_axis(values, order, -1)[:, :top]
