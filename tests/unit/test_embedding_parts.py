"""Embeddings without a system: what a body may say, how inputs become tasks and batches, how vectors are made of hidden states."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pipeline.config import PoolSettings, QueueSettings
from pipeline.embeddings import PART_TOKENS, asked_of, embedding_request, offer_of, parts_of, vectors_of
from pipeline.errors import ConfigError, EngineError, InvalidRequest, RequestFailed, Unservable, WireError
from pipeline.surface.embedding_bodies import dimensions_of, embedding_body, several
from workers.__main__ import check_embeds
from workers.engine import EngineInfo, load_embedding_engine
from workers.engines.embedding import BatchedEmbedding, packed

OFFER = offer_of(PoolSettings(embeddings=True), QueueSettings(), 256)
MATRYOSHKA = offer_of(PoolSettings(embeddings=True, matryoshka=True), QueueSettings(), 256)


def body(**fields):
    return embedding_body(json.dumps({"model": "m", "input": "a", **fields}).encode())


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a text", [("input", "a text")]),
        ([5, 6], [("input", [5, 6])]),
        (["a", "b"], [("input[0]", "a"), ("input[1]", "b")]),
        ([[5], [6, 7]], [("input[0]", [5]), ("input[1]", [6, 7])]),
    ],
)
def test_an_input_is_a_text_or_ids_or_several_of_one(given, inputs):
    assert several(body(input=given).input) == inputs


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], "input"), (["a"] * 2049, "input"), (["a", [5]], "input[1]"), ([[5], "a"], "input[1]"), ([5, "a"], "input[1]"),
        (["a", 5], "input[1]"), (5, "input"), (None, "input"), ([1.5], "input[0]"), ([[["a"]]], "input[0][0]"),
    ],
)  # fmt: skip
def test_what_an_input_is_not_is_named_by_its_path(given, param):
    with pytest.raises(InvalidRequest) as raised:
        several(body(input=given).input)
    assert raised.value.param == param


def test_dimensions_are_for_models_that_were_trained_for_them():
    assert OFFER and MATRYOSHKA
    assert dimensions_of(body(), OFFER) is None
    assert dimensions_of(body(dimensions=256), OFFER) is None, "that asks for nothing"
    assert dimensions_of(body(dimensions=64), MATRYOSHKA) == 64
    with pytest.raises(InvalidRequest, match=r"one length, 256: it does not support dimensions") as raised:
        dimensions_of(body(dimensions=64), OFFER)
    assert (raised.value.param, raised.value.code) == ("dimensions", "unsupported_parameter")
    with pytest.raises(InvalidRequest, match="vectors of 256 numbers, 257 are asked for"):
        dimensions_of(body(dimensions=257), MATRYOSHKA)


def test_a_pool_offers_them_where_it_is_told_to_and_as_many_a_task_as_fit_a_result():
    assert offer_of(PoolSettings(), QueueSettings(), 256) is None
    assert OFFER is not None and OFFER.part_inputs == 1023
    assert len(msgspec.msgpack.encode(bytes(4 * 256 * OFFER.part_inputs))) <= QueueSettings().max_result_bytes
    unknown = offer_of(PoolSettings(embeddings=True), QueueSettings(), None)
    assert unknown is not None and unknown.part_inputs == 15
    tiny = offer_of(PoolSettings(embeddings=True), QueueSettings(max_result_bytes=1), 256)
    assert tiny is not None and tiny.part_inputs == 1


def test_inputs_become_tasks_of_consecutive_ones():
    assert parts_of([5], 100) == [range(1)]
    assert parts_of([1] * 5, 2) == [range(2), range(2, 4), range(4, 5)]
    assert parts_of([PART_TOKENS + 1, 1, PART_TOKENS, 1], 100) == [range(1), range(1, 2), range(2, 3), range(3, 4)]
    assert parts_of([PART_TOKENS - 1, 1, 1], 100) == [range(2), range(2, 3)]


def test_a_task_carries_its_inputs_and_what_cannot_be_is_rejected():
    request = embedding_request("p-1", "p", [[5], [6, 7]], 64, created_s=1)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=type(request))
    assert again.input.token_ids == [5, 6, 7]
    assert (asked_of(again).sequences, asked_of(again).dimensions) == ([[5], [6, 7]], 64)
    for args, kwargs in (([[1, 1]], {}), ([[0, 3]], {}), ([[]], {}), (["x"], {}), ([], {}), ([[3]], {"dimensions": 0})):
        call = msgspec.structs.replace(request.task, args=args, kwargs=kwargs)
        with pytest.raises(WireError, match="p-1"):
            asked_of(msgspec.structs.replace(request, task=call))


def test_a_result_is_as_many_vectors_as_there_are_inputs():
    assert vectors_of("r", msgspec.msgpack.encode(b"aaaabbbb"), 2) == [b"aaaa", b"bbbb"]
    for result in (b"", msgspec.msgpack.encode(b""), msgspec.msgpack.encode(b"aaaabbbb1"), msgspec.msgpack.encode([1])):
        with pytest.raises(RequestFailed, match="its result is not 2 vectors"):
            vectors_of("r", result, 2)


def test_a_vector_is_little_endian_and_has_length_1_again_when_it_was_cut():
    row = np.array([3, 4, 12], dtype=np.float32)
    assert np.frombuffer(packed(row, None, is_normalized=False), "<f4").tolist() == [3, 4, 12]
    np.testing.assert_allclose(np.frombuffer(packed(row, 2, is_normalized=False), "<f4"), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(np.frombuffer(packed(row, None, is_normalized=True), "<f4"), row / 13, rtol=1e-6)
    assert np.frombuffer(packed(row * 0, None, is_normalized=True), "<f4").tolist() == [0, 0, 0]


class Recorder:
    """An embedder that notes its batches, and answers each sequence with its sum and length. It fails for the token 13."""

    is_normalized = False

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.may_go_on = asyncio.Event()

    async def start(self) -> EngineInfo:
        return EngineInfo(
            name="recorder", model="m", layout="", block_size=1, num_blocks=100, block_nbytes=1, max_model_len=100,
            max_num_seqs=4, max_num_batched_tokens=10,
        )  # fmt: skip

    async def vectors(self, sequences):
        self.batches.append([list(sequence) for sequence in sequences])
        await self.may_go_on.wait()
        if any(13 in sequence for sequence in sequences):
            raise RuntimeError("unlucky")
        return np.array([[sum(sequence), len(sequence)] for sequence in sequences], dtype=np.float32)

    async def close(self) -> None:
        pass


def numbers(vectors):
    return [np.frombuffer(vector, "<f4").tolist() for vector in vectors]


async def test_batches_are_bounded_by_tokens_and_take_from_several_requests_in_their_order():
    recorder = Recorder()
    engine = BatchedEmbedding(recorder)
    await engine.start()
    first = asyncio.create_task(engine.embed("a", [[1] * 4, [2] * 5, [3] * 2, [4] * 11], None))
    second = asyncio.create_task(engine.embed("b", [[5] * 8, [6]], None))
    gone = asyncio.create_task(engine.embed("c", [[7]], None))
    await asyncio.sleep(0)
    assert engine.stats().waiting == 7
    await engine.cancel("c")
    recorder.may_go_on.set()
    assert numbers(await first) == [[4, 4], [10, 5], [6, 2], [44, 11]]
    assert numbers(await second) == [[40, 8], [6, 1]]
    assert recorder.batches == [[[1] * 4, [2] * 5], [[3] * 2], [[4] * 11], [[5] * 8, [6]]]
    assert (engine.stats().steps, engine.stats().prompt_tokens_computed) == (4, 31)
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    with pytest.raises(asyncio.CancelledError):
        await gone
    await engine.close()


async def test_a_batch_that_fails_fails_its_requests_and_no_others():
    recorder = Recorder()
    recorder.may_go_on.set()
    engine = BatchedEmbedding(recorder)
    await engine.start()
    with pytest.raises(EngineError, match="a batch failed: RuntimeError: unlucky"):
        await engine.embed("a", [[13], [1] * 10, [2] * 10], None)
    assert numbers(await engine.embed("b", [[3]], 1)) == [[1]]
    assert recorder.batches[0] == [[13]]
    await engine.close()
    await engine.close()


def test_engines_without_embeddings_say_so_before_anything_is_loaded():
    with pytest.raises(ConfigError, match=r"'vllm' makes no embeddings, only torch does"):
        load_embedding_engine(PoolSettings(engine="vllm"), None)


def test_the_queue_embed_is_either_batons_or_ones_own():
    check_embeds(PoolSettings(embeddings=True), "p", "embed", has_app=False)
    check_embeds(PoolSettings(), "p", "embed", has_app=True)
    check_embeds(PoolSettings(), "p", "decode", has_app=False)
    with pytest.raises(ConfigError, match=r"pools\.p\.embeddings is false, so nothing would come"):
        check_embeds(PoolSettings(), "p", "embed", has_app=False)
    with pytest.raises(ConfigError, match="its queue embed is Baton's own"):
        check_embeds(PoolSettings(embeddings=True), "p", "embed", has_app=True)


def sentence_model(folder: Path, config: dict, *, normalizes: bool = True) -> str:
    """The files of sentence-transformers."""
    kind = "sentence_transformers.models."
    modules = [{"path": "", "type": f"{kind}Transformer"}, {"path": "1_Pooling", "type": f"{kind}Pooling"}]
    modules += [{"path": "2_Normalize", "type": f"{kind}Normalize"}] if normalizes else []
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"word_embedding_dimension": 4, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_the_models_own_files_say_how_it_pools(tmp_path, config, mode):
    from workers.engines.torch.pooling import Pooling, pooling_of

    assert pooling_of("m", sentence_model(tmp_path, config), "auto") == Pooling(mode, True)
    assert pooling_of("m", str(tmp_path), "last") == Pooling("last", True)


def test_a_model_without_such_files_pools_its_last_token_as_vllm_does(tmp_path):
    from workers.engines.torch.pooling import Pooling, pooling_of

    assert pooling_of("m", str(tmp_path), "auto") == Pooling("last", True)
    assert pooling_of("m", str(tmp_path), "mean") == Pooling("mean", True)
    place = sentence_model(tmp_path, {"pooling_mode_max_tokens": True}, normalizes=False)
    with pytest.raises(Unservable, match=r"it pools by pooling_mode_max_tokens; known are last, mean and cls"):
        pooling_of("m", place, "auto")
    assert pooling_of("m", place, "cls") == Pooling("cls", False)


def test_pooling_takes_the_last_the_first_or_the_mean_of_each_sequence():
    import torch

    from workers.engines.torch.pooling import Pooling

    hidden = torch.arange(12.0).view(6, 2)
    bounds = [0, 1, 4, 6]
    assert Pooling("last").vectors(hidden, bounds).tolist() == [[0, 1], [6, 7], [10, 11]]
    assert Pooling("cls").vectors(hidden, bounds).tolist() == [[0, 1], [2, 3], [8, 9]]
    assert Pooling("mean").vectors(hidden, bounds).tolist() == [[0, 1], [4, 5], [9, 10]]
