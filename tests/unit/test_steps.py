"""Steps that queue up behind a write leave merged, nothing lost and nothing out of order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.protocol import FinishReason, LLMEngineOutput
from workers.steps import merged


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(1, 3)), max_size=40))
def test_merging_keeps_every_token_at_its_index(rows: list[tuple[int, int, int]]) -> None:
    lengths: dict[tuple[str, int], int] = {}
    outputs = []
    for request, choice, count in rows:
        key = (f"r{request}", choice)
        start = lengths.get(key, 0)
        outputs.append(LLMEngineOutput(key[0], choice, start, list(range(start, start + count))))
        lengths[key] = start + count
    joined = merged(outputs)
    assert len(joined) == len(lengths)
    for output in joined:
        assert output.index == 0
        assert output.token_ids == list(range(lengths[output.request_id, output.choice]))


def test_a_finish_reason_stays_with_its_token() -> None:
    outputs = [LLMEngineOutput("r", 0, 3, [1]), LLMEngineOutput("r", 0, 4, [2], FinishReason.EOS)]
    assert merged(outputs) == [LLMEngineOutput("r", 0, 3, [1, 2], FinishReason.EOS)]


def test_what_does_not_follow_is_left_as_it_is() -> None:
    apart = [LLMEngineOutput("r", 0, 3, [1]), LLMEngineOutput("r", 0, 9, [2])]
    assert merged(apart) == apart


def test_an_error_is_never_merged_into_tokens() -> None:
    outputs = [LLMEngineOutput("r", 0, 3, [1]), LLMEngineOutput("r", 0, 4, [], FinishReason.ERROR, error="boom")]
    assert merged(outputs) == outputs
