"""Answers that follow a grammar, in vLLM: handed over, resumed at any token, and refused alone where there is none to follow."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from pipeline.builtin import BUILTIN_MODEL
from pipeline.errors import Unservable
from pipeline.protocol import BackendInput, FinishReason, GuidedDecoding, Log
from pipeline.tokenizer import Tokenizer
from tests.contract.engines import request_of
from tests.with_vllm.pairs import Pair, pair_at, prompt
from tests.with_vllm.settings import requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Grace"]}, "years": {"type": "array", "items": {"type": "integer"}, "maxItems": 4}},
    "required": ["name", "years"],
    "additionalProperties": False,
}  # fmt: skip
CONSTRAINTS = {
    "json": GuidedDecoding(json=json.dumps(SCHEMA)),
    "regex": GuidedDecoding(regex=r"(ab|cd){3}-[0-9]{4}"),
    "choice": GuidedDecoding(choice=["the first of them", "the second one", "none"]),
    "grammar": GuidedDecoding(grammar='root ::= "<" [a-z]+ ">" root | "."'),
}
SAMPLING = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 3},
    "seeded, cut": {"temperature": 1.0, "seed": 4, "top_k": 50},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with pair_at(tmp_path_factory.mktemp("blocks")) as both:
        yield both


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUILTIN_MODEL)


def constrained(name: str, kind: str, how: str, tokenizer: Tokenizer, length: int = 70, n: int = 1) -> BackendInput:
    options = {"guided_decoding": CONSTRAINTS[kind], "n": n, **SAMPLING[how]}
    asked = request_of(name, prompt(length, len(name)), 60, **options)
    return msgspec.structs.replace(asked, eos_token_ids=tokenizer.eos_token_ids)


def follows(kind: str, text: str) -> bool:
    match kind:
        case "json":
            said = json.loads(text)
            return said["name"] in ("Ada", "Grace") and all(isinstance(year, int) for year in said["years"])
        case "regex":
            return re.fullmatch(r"(ab|cd){3}-[0-9]{4}", text) is not None
        case "choice":
            return text in (CONSTRAINTS["choice"].choice or ())
        case _:
            return re.fullmatch(r"(<[a-z]+>)*\.", text) is not None


@pytest.mark.parametrize("how", SAMPLING)
@pytest.mark.parametrize("kind", CONSTRAINTS)
async def test_an_answer_follows_its_grammar_and_goes_on_at_any_token(
    pair: Pair, tokenizer: Tokenizer, kind: str, how: str
) -> None:
    asked = constrained(f"whole {kind} {how}", kind, how, tokenizer)
    [[whole]] = await pair.prefill.generate(asked)
    if pair.prefill.ends[asked.request_id, 0] is FinishReason.EOS:
        assert follows(kind, tokenizer.decode(whole)), tokenizer.decode(whole)
    for count in {1, 2, len(whole) // 2, len(whole) - 1}:
        again = msgspec.structs.replace(asked, request_id=f"{kind} {how} {count}")
        await pair.decode.engine.decode(again, None, Log(tokens=[whole[:count]], finished=[None]))
        assert (await pair.decode.finished(again))[0] == whole[count:], count


@pytest.mark.parametrize("kind", CONSTRAINTS)
@pytest.mark.parametrize("length", [1, 33, 64, 200])
async def test_handed_over_it_is_the_same_and_no_prompt_token_is_computed(
    pair: Pair, tokenizer: Tokenizer, kind: str, length: int
) -> None:
    asked = constrained(f"here {kind} {length}", kind, "seeded", tokenizer, length, n=3)
    [here] = await pair.prefill.generate(asked)
    await pair.rests()
    before = pair.decode.engine.stats().prompt_tokens_computed
    over = await pair.decode.take_over(pair.prefill, msgspec.structs.replace(asked, request_id=f"over {kind} {length}"))
    assert over == here
    await pair.rests()
    assert pair.decode.engine.stats().prompt_tokens_computed == before


async def test_a_log_that_its_grammar_does_not_allow_fails_its_request_alone_and_names_the_token(
    pair: Pair, tokenizer: Tokenizer
) -> None:
    asked = constrained("foreign", "regex", "greedy", tokenizer)
    [[whole]] = await pair.prefill.generate(asked)
    log = Log(tokens=[[*whole[:2], 300, *whole[3:5]]], finished=[None])
    with pytest.raises(Unservable, match=r"bad log, choice 0.*token 300 at index 2"):
        await pair.decode.engine.decode(msgspec.structs.replace(asked, request_id="bad log"), None, log)
    await pair.rests()
    [[after]] = await pair.decode.generate(msgspec.structs.replace(asked, request_id="after it"))
    assert after == whole


@pytest.mark.parametrize(
    "wrong", [GuidedDecoding(json="{"), GuidedDecoding(regex="(a"), GuidedDecoding(grammar="root = nonsense ::")]
)
@pytest.mark.parametrize("stage", ["prefill", "decode"])
async def test_what_is_no_grammar_is_refused(pair: Pair, wrong: GuidedDecoding, stage: str) -> None:
    asked = request_of("wrong", prompt(20), guided_decoding=wrong)
    with pytest.raises(Unservable, match="wrong"):
        if stage == "prefill":
            await pair.prefill.engine.prefill(asked, Log.empty(1))
        else:
            await pair.decode.engine.decode(asked, None, Log.empty(1))
    await pair.rests()


@pytest.mark.parametrize("how", ["greedy", "seeded"])
async def test_an_answer_ends_with_its_grammar_however_long_it_should_be(
    pair: Pair, tokenizer: Tokenizer, how: str
) -> None:
    """`min_tokens` beyond the end of the grammar: nothing may come, so the end comes."""
    asked = constrained(f"long {how}", "choice", how, tokenizer)
    asked = msgspec.structs.replace(
        asked, stop_conditions=msgspec.structs.replace(asked.stop_conditions, min_tokens=40)
    )
    [tokens] = await pair.decode.take_over(pair.prefill, asked)
    assert pair.decode.ends[asked.request_id, 0] is FinishReason.EOS
    assert follows("choice", tokenizer.decode(tokens))
