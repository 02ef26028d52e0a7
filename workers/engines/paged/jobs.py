"""What an engine holds of a request: its choices, and who waits for what."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.protocol import BackendInput, FinishReason, LLMEngineOutput, Log
from workers.engines.paged.prompts import PromptScores
from workers.engines.paged.sequence import Place, Sequence
from workers.engines.paged.shaping import Constraint


@dataclass(slots=True, eq=False)
class Job:
    """What the engine holds of a request: the choices that have not ended, and who waits for it."""

    request: BackendInput
    sequences: list[Sequence]
    joined: asyncio.Future[int]  # decode: admitted; the prompt tokens that were in the prefix cache
    computed: asyncio.Future[list[LLMEngineOutput]]  # prefill: the first outputs
    complete: list[LLMEngineOutput] = field(default_factory=list)  # decode: choices whose log was complete on arrival
    source: Sequence | None = None  # prefill: whose blocks are exported
    transfer: asyncio.Future[Any] | None = None  # copies from or to the blocks, which are kept until it is done

    @property
    def leader(self) -> Sequence:
        """The choice that computes or fetches the prompt."""
        return next(sequence for sequence in self.sequences if sequence.place is not Place.FOLLOWING)


def sampling_choices(done: Log, *, to_export: bool) -> list[int]:
    """The choices that get tokens: those that have not ended, and for an export those without a token."""
    choices = [choice for choice, reason in enumerate(done.finished) if reason is None]
    return [choice for choice in choices if not (to_export and done.tokens[choice])]


def new_job(
    request: BackendInput,
    done: Log,
    arrival: int,
    max_model_len: int,
    constraints: Mapping[int, Constraint],
    *,
    to_export: bool,
    scores: PromptScores | None = None,
) -> Job:
    """One sequence for each choice that has not ended; the first without a token leads, the others follow.

    `to_export`: the prompt only, and the first token of each choice that lacks it. `constraints`: of the choices that sample, where
    the request has a grammar. `scores`: where the prompt is computed here and something is to be told of it.
    """
    loop = asyncio.get_running_loop()
    unfinished = sampling_choices(done, to_export=False)
    choices = sampling_choices(done, to_export=to_export) or unfinished[:1]
    choices.sort(key=lambda choice: bool(done.tokens[choice]))
    sequences = [
        Sequence(
            request,
            choice,
            arrival,
            output=[] if to_export else list(done.tokens[choice]),
            to_export=to_export,
            to_sample=not (to_export and done.tokens[choice]),
            constraint=constraints.get(choice),
            scores=scores,
        )
        for choice in choices
    ]
    job = Job(request, sequences, loop.create_future(), loop.create_future())
    if not to_export:
        end_complete(job, max_model_len)
    follow_first(job.sequences)
    return job


def end_complete(job: Job, max_model_len: int) -> None:
    """Choices whose log is complete, although nobody has said so, end without a step."""
    for sequence in list(job.sequences):
        reason = sequence.finish_reason(max_model_len)
        if reason is not None and sequence.output:
            job.sequences.remove(sequence)
            job.complete.append(output_of(sequence, [], reason))


def follow_first(sequences: list[Sequence]) -> None:
    """The first computes the prompt; the others wait for it."""
    for follower in sequences[1:]:
        follower.leader, follower.place = sequences[0], Place.FOLLOWING
        sequences[0].followers.append(follower)


def output_of(
    sequence: Sequence, token_ids: list[int], reason: FinishReason | None, error: str | None = None
) -> LLMEngineOutput:
    """The output of a choice whose newest tokens are these."""
    index = len(sequence.output) - len(token_ids)
    return LLMEngineOutput(sequence.request.request_id, sequence.choice, index, token_ids, reason, None, error)


def cancelled(job: Job) -> asyncio.CancelledError:
    """What prefill and decode raise for a request that was cancelled meanwhile."""
    return asyncio.CancelledError(f"request {job.request.request_id} was cancelled")
