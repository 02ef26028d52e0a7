"""Answers that follow a grammar: what vLLM is asked for, and how a grammar goes on where a log ends.

vLLM moves a request's grammar on by the tokens that it samples, so one that is resumed with its log as part of the prompt would begin its
grammar anew. It is therefore led through the log before vLLM may use it: nothing is sampled twice, and what comes next continues what a
client has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from pipeline.errors import EngineError
from pipeline.protocol import BackendInput


def constraint_of(request: BackendInput) -> Any:
    """vLLM's `StructuredOutputsParams`, or None where any text will do."""
    guided = request.sampling_options.guided_decoding
    if guided is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(json=guided.json, regex=guided.regex, choice=guided.choice, grammar=guided.grammar)


def lead_through(request: Any, log: Sequence[int], on_error: Callable[[Exception], None]) -> None:
    """Let the grammar of vLLM's `request`, which is being compiled, stand behind `log` once it is there.

    `on_error` hears on some thread why there is none; vLLM then gives up on this request alone.
    """
    constraint = request.structured_output_request
    if constraint is None:
        return
    ready: Future[Any] = Future()

    def lead(compiled: Future[Any]) -> None:
        try:
            grammar = compiled.result()
            accept(grammar, request.request_id, log)
        except Exception as error:  # noqa: BLE001  # it belongs to the request
            on_error(error)
            ready.set_exception(error)
        else:
            ready.set_result(grammar)

    compiling: Future[Any] = constraint._grammar  # its property waits for it in 0.26
    constraint.grammar = ready
    compiling.add_done_callback(lead)


def accept(grammar: Any, key: str, log: Sequence[int]) -> None:
    """Move a grammar on by the tokens of a log. Raises `EngineError` naming the first that it does not allow."""
    for index, token in enumerate(log):
        if grammar.is_terminated():
            return
        if not grammar.accept_tokens(key, [token]):
            raise EngineError(f"token {token} at index {index} of the log is not what the request's grammar allows")
