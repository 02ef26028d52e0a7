"""Answers that follow a grammar in the torch engine: whole, in company, resumed at any token, handed over, preempted; and what is none."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import numpy as np
import pytest
import torch

from pipeline.builtin import BUILTIN_MODEL
from pipeline.errors import Unservable
from pipeline.protocol import BackendInput, FinishReason, GuidedDecoding, Log
from pipeline.tokenizer import Tokenizer
from tests.contract.engines import (
    Engines,
    prompt,
    request_of,
    require_cuda,
    stopping,
    with_output,
    write_model,
)
from workers.engines.torch.grammars import leave

SCHEMAS: dict[str, dict[str, Any]] = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"enum": ["Ada", "Grace", "Zoë \"Z\" 🦊"]},
            "years": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 3000}, "maxItems": 4},
            "is_known": {"type": "boolean"},
        },
        "required": ["name", "years", "is_known"],
        "additionalProperties": False,
    },
    "text": {"type": "string", "minLength": 1, "maxLength": 20},
    "nested": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "parts": {
                "type": "array",
                "items": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/part"}]},
                "minItems": 1,
                "maxItems": 3,
            },
        },
        "required": ["id", "parts"],
        "additionalProperties": False,
        "$defs": {
            "part": {
                "type": "object",
                "properties": {"address": {"type": "string", "format": "ipv4"}, "kind": {"const": "part"}},
                "required": ["address", "kind"],
                "additionalProperties": False,
            }
        },
    },
}  # fmt: skip
CONSTRAINTS: dict[str, GuidedDecoding] = {
    **{name: GuidedDecoding(json=json.dumps(schema)) for name, schema in SCHEMAS.items()},
    "regex": GuidedDecoding(regex=r"(ab|cd){3}-[0-9]{4}"),
    "choice": GuidedDecoding(choice=["the first of them", 'a "quoted" one', "über\n\\", "no"]),
    "grammar": GuidedDecoding(grammar='start: part* "."\npart: "<" /[a-z]{1,5}/ ">"'),
    "ebnf": GuidedDecoding(grammar='root ::= part* "."\npart ::= "<" [a-z]{1,5} ">"'),
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 3},
    "hot": {"temperature": 1.6, "seed": 4, "min_p": 0.01},
    "penalized": {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
}


@pytest.fixture
def engines(short_dir: Path) -> Engines:
    return Engines("torch", BUILTIN_MODEL, short_dir)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUILTIN_MODEL)


def constrained(name: str, kind: str, how: str, length: int = 40, n: int = 1, max_tokens: int = 200) -> BackendInput:
    options = {"guided_decoding": CONSTRAINTS[kind], "n": n, **SAMPLING[how]}
    asked = request_of(name, prompt(length, len(name)), max_tokens, **options)
    return msgspec.structs.replace(asked, eos_token_ids=Tokenizer.load(BUILTIN_MODEL).eos_token_ids)


def every(n: int = 1) -> list[BackendInput]:
    return [
        constrained(f"{kind} {how}", kind, how, 20 + 13 * number, n)
        for number, (kind, how) in enumerate((kind, how) for kind in CONSTRAINTS for how in SAMPLING)
    ]


def renamed(request: BackendInput, name: str) -> BackendInput:
    return msgspec.structs.replace(request, request_id=name)


def assert_follows(kind: str, text: str) -> None:
    if kind in SCHEMAS:
        jsonschema_rs.validate(SCHEMAS[kind], json.loads(text), validate_formats=True)
        return
    match kind:
        case "regex":
            assert re.fullmatch(r"(ab|cd){3}-[0-9]{4}", text)
        case "choice":
            assert text in (CONSTRAINTS["choice"].choice or ())
        case _:
            assert re.fullmatch(r"(<[a-z]{1,5}>)*\.", text)


async def test_answers_follow_and_end_and_depend_on_nothing_else(engines: Engines, tokenizer: Tokenizer) -> None:
    requests = every(n=3)
    async with (
        engines.engine() as together,
        engines.engine(num_blocks=24, prefix_cache=False) as small,
        engines.engine() as prefill,
        engines.engine() as decode,
    ):
        answers = await together.generate(*requests)
        for request, choices in zip(requests, answers, strict=True):
            kind = request.request_id.split()[0]
            for number, tokens in enumerate(choices):
                assert together.ends[request.request_id, number] is FinishReason.EOS
                assert tokens[-1] in request.eos_token_ids
                assert_follows(kind, tokenizer.decode(tokens))
        assert len({tuple(tokens) for choices in answers for tokens in choices}) > len(requests)
        await asyncio.gather(*(small.engine.decode(request, None, Log.empty(3)) for request in requests))
        assert [await small.finished(request) for request in requests] == answers
        assert small.engine.stats().preemptions > 0
        for request, choices in zip(requests, answers, strict=True):
            assert await together.generate(renamed(request, f"alone {request.request_id}")) == [choices]
            assert await decode.take_over(prefill, request) == choices
        assert decode.engine.stats().prompt_tokens_computed == 0


@pytest.mark.parametrize("kind", CONSTRAINTS)
async def test_an_answer_goes_on_at_any_token(engines: Engines, kind: str) -> None:
    request = constrained("whole", kind, "hot")
    async with engines.engine() as one:
        [[whole]] = await one.generate(request)
        for count in range(1, len(whole) + 1):
            again = renamed(request, f"from {count}")
            await one.engine.decode(again, None, Log(tokens=[whole[:count]], finished=[None]))
            assert await one.finished(again) == [whole[count:]]
            assert one.ends[again.request_id, 0] is FinishReason.EOS


async def test_where_the_grammar_is_complete_the_answer_ends_whatever_else_is_asked(
    engines: Engines, tokenizer: Tokenizer
) -> None:
    request = constrained("r", "choice", "seeded")
    others = [
        stopping(renamed(request, "ignored"), ignore_eos=True),
        stopping(renamed(request, "early"), min_tokens=150),
        msgspec.structs.replace(stopping(request, ignore_eos=True), request_id="untold", eos_token_ids=[]),
    ]
    async with engines.engine() as one:
        [[expected]] = await one.generate(request)
        for other in others:
            assert await one.generate(other) == [[expected]]
            assert one.ends[other.request_id, 0] is FinishReason.EOS
        stopped = stopping(renamed(request, "stopped"), stop_token_ids=[expected[1]])
        assert await one.generate(stopped) == [[expected[:2]]]
        assert one.ends["stopped", 0] is FinishReason.STOP


async def test_log_probabilities_are_of_what_the_grammar_leaves(engines: Engines) -> None:
    request = with_output(constrained("r", "choice", "penalized"), logprobs=20)
    async with engines.engine() as one:
        [[tokens]] = await one.generate(request)
        outputs = [output for output in one.outputs if output.request_id == "r"]
        assert len(outputs) == len(tokens)
        for output in outputs:
            assert output.log_probs is not None
            assert output.top_logprobs is not None
            possible = {token: math.exp(value) for token, value in output.top_logprobs[0] if value > -math.inf}
            assert sum(possible.values()) == pytest.approx(1, abs=1e-4)
            assert possible[output.token_ids[0]] == pytest.approx(math.exp(output.log_probs[0]))
        last = outputs[-1].top_logprobs
        assert last is not None
        assert last[0][:2] == [(tokens[-1], 0.0), (last[0][1][0], -math.inf)], "only the end may come"


async def test_a_log_that_leaves_its_grammar_fails_its_request_alone_and_names_the_token(engines: Engines) -> None:
    request = constrained("r", "regex", "greedy")
    async with engines.engine() as one:
        [[whole]] = await one.generate(request)
        log = Log(tokens=[[*whole[:2], 300, *whole[3:5]]], finished=[None])
        with pytest.raises(Unservable, match=r"request bad, choice 0: token 300 at index 2 of the log"):
            await one.engine.decode(renamed(request, "bad"), None, log)
        assert await one.generate(renamed(request, "after")) == [[whole]]
        assert one.engine.stats().blocks_used == 0


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (GuidedDecoding(json="{"), "JSON"),
        (GuidedDecoding(json='{"type": "strin"}'), "Invalid type: strin"),
        (GuidedDecoding(json='{"not": {"type": "string"}}'), "not"),
        (GuidedDecoding(regex="(a"), "unclosed group"),
        (GuidedDecoding(grammar="root = nonsense"), "neither Lark"),
        (GuidedDecoding(grammar="root ::= missing"), "'missing' not found"),
        (GuidedDecoding(choice=[]), "asks for nothing"),
        (GuidedDecoding(), "asks for nothing"),
    ],
)
@pytest.mark.parametrize("stage", ["prefill", "decode"])
async def test_what_is_no_grammar_is_refused(engines: Engines, wrong: GuidedDecoding, why: str, stage: str) -> None:
    asked = request_of("wrong", prompt(20), guided_decoding=wrong)
    async with engines.engine() as one:
        with pytest.raises(Unservable, match=f"request wrong: guided_decoding: .*{why}"):
            if stage == "prefill":
                await one.engine.prefill(asked, Log.empty(1))
            else:
                await one.engine.decode(asked, None, Log.empty(1))
        assert one.engine.stats().waiting == 0


async def test_a_model_without_a_tokenizer_serves_all_but_grammars(tmp_path: Path, short_dir: Path) -> None:
    async with Engines("torch", str(write_model(tmp_path)), short_dir).engine() as one:
        with pytest.raises(Unservable, match=r"request r: model .* follows no grammars: no tokenizer in"):
            await one.engine.decode(
                request_of("r", prompt(9), guided_decoding=CONSTRAINTS["regex"]), None, Log.empty(1)
            )
        assert len((await one.generate(request_of("plain", prompt(9))))[0][0]) == 12


def heavy() -> GuidedDecoding:
    """A schema that takes a while to compile."""
    words = {f"p{i}": {"type": "array", "items": {"enum": [f"{i}-{j}" for j in range(100)]}} for i in range(300)}
    return GuidedDecoding(json=json.dumps({"type": "object", "properties": words, "required": list(words)}))


async def test_while_a_grammar_is_compiled_others_go_on_and_its_request_may_be_cancelled(engines: Engines) -> None:
    asked = request_of("heavy", prompt(20), 5, guided_decoding=heavy())
    async with engines.engine() as one:
        running = request_of("running", prompt(20), 1500)
        await one.engine.decode(running, None, Log.empty(1))
        await one.until(lambda: ("running", 0) in one.tokens)
        cancelled = asyncio.create_task(one.engine.decode(asked, None, Log.empty(1)))
        await asyncio.sleep(0)
        with pytest.raises(Unservable, match="already in this engine"):
            await one.engine.decode(asked, None, Log.empty(1))
        await one.engine.cancel("heavy")
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        before = len(one.tokens["running", 0])
        await one.engine.decode(renamed(asked, "again"), None, Log.empty(1))
        assert len(one.tokens["running", 0]) > before
        await one.finished(renamed(asked, "again"))
        await one.engine.cancel("running")
        assert ("heavy", 0) not in one.tokens


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
@pytest.mark.parametrize(("size", "rows"), [(64, [1, 2, 3]), (93, [0, 2, 4]), (200_001, [0, 1, 4])])
def test_what_has_no_bit_is_left_out(size: int, rows: list[int], share: float, device: str) -> None:
    if device == "cuda":
        require_cuda()
    generator = np.random.default_rng(1)
    flags = generator.random((3, -(-size // 32) * 32)) < share
    bits = np.packbits(flags, axis=1, bitorder="little").view(np.int32)
    logits = torch.from_numpy(generator.standard_normal((5, size)).astype(np.float32)).to(device)
    expected = logits.clone()
    for row, allowed in zip(rows, flags, strict=True):
        expected[row, ~torch.from_numpy(allowed[:size]).to(device)] = -torch.inf
    leave(logits, rows, bits)
    assert torch.equal(logits, expected)
