"""Log probabilities as vLLM gives them, as Baton's engines do."""

from __future__ import annotations

from typing import Any

from pipeline.protocol import BackendInput, LLMEngineOutput
from workers.engines.paged.prompts import best_of, pack_scores


def logprobs_of(output: Any, asked: int | None) -> tuple[list[float] | None, list[list[tuple[int, float]]] | None]:
    """The log probabilities of an output's tokens, and of the `asked` likeliest at each place.

    vLLM gives a row for each token: itself, then the likeliest, as many as any request of the step has asked for.
    """
    rows = output.new_logprobs
    if rows is None or asked is None:
        return None, None
    ids, values = rows.logprob_token_ids[:, : asked + 1].tolist(), rows.logprobs[:, : asked + 1].tolist()
    tops = [list(zip(row_ids[1:], row[1:], strict=True)) for row_ids, row in zip(ids, values, strict=True)]
    return [row[0] for row in values], tops


def prompt_records(output: Any, request: BackendInput) -> bytes:
    """What is told of the request's prompt, with the first output of the choice that computed it. What stands behind was logged.

    vLLM gives a row for each token: itself, then the likeliest.
    """
    rows, top = output.new_prompt_logprobs_tensors, request.output_options.prompt_logprobs
    if rows is None or top is None:
        return b""
    count = len(request.token_ids) - 1
    ids, values, ranks = (
        part[:count].numpy() for part in (rows.logprob_token_ids, rows.logprobs, rows.selected_token_ranks)
    )
    return pack_scores(values[:, 0], ranks, *best_of(ids[:, 1:], values[:, 1:], top))


def prompt_alone(output: LLMEngineOutput) -> LLMEngineOutput:
    """What an output tells of the prompt, without its token: of a choice that has its own already."""
    return LLMEngineOutput(output.request_id, output.choice, 0, [], prompt_logprobs=output.prompt_logprobs)
