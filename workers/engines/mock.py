"""An engine without a model: time from a formula, real blocks with real bytes.

Each token of a sequence leaves bytes in its slot of a block, derived from the token and its position. The next token is a
function of the bytes that are in the sequence's blocks, of seed, choice and index: a missing, stale or foreign block, or one
flipped byte, gives other tokens.
"""

from __future__ import annotations

import asyncio
import os
import signal
from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.config import EngineSettings, MockSettings, PoolSettings
from pipeline.errors import ConfigError, Unservable
from pipeline.protocol import BackendInput
from workers.engine import AsyncEngine
from workers.engines.paged.engine import PagedEngine
from workers.engines.paged.randomness import Bits, bits, mix
from workers.engines.paged.runner import Chosen, Draw, Row, RunnerInfo
from workers.engines.paged.shaping import Constraint
from workers.transfer import Memory, Transfer, host

LANE_NBYTES = 8
_TOKEN, _ORDER = np.uint64(0xD1B54A32D192ED03), np.uint64(0x8CB92BA72F3D8DD7)


def create_engine(pool: PoolSettings, engine: EngineSettings, transfer: Transfer) -> AsyncEngine:
    """The mock engine as configured."""
    return PagedEngine(MockRunner(engine.mock, pool), transfer)


class MockRunner:
    """A `Runner` whose "model" is arithmetic on the bytes of the blocks."""

    def __init__(self, settings: MockSettings, pool: PoolSettings) -> None:
        if settings.block_nbytes % (settings.block_size * LANE_NBYTES):
            raise ConfigError(
                f"engine.mock.block_nbytes ({settings.block_nbytes}) must be a multiple of {LANE_NBYTES} x block_size"
            )
        self._settings = settings
        self._pool = pool
        self._lanes = settings.block_nbytes // settings.block_size // LANE_NBYTES
        # Odd, so that multiplying by one loses nothing: any changed byte changes the slot's digest.
        odd = mix(np.arange(2 * self._lanes, dtype=np.uint64)) | np.uint64(1)
        self._writers, self._readers = odd[: self._lanes], odd[self._lanes :]

    async def start(self) -> RunnerInfo:
        """Take the memory of all blocks."""
        settings = self._settings
        shape = settings.num_blocks, settings.block_size
        self._data: Bits = np.zeros((*shape, self._lanes), dtype=np.uint64)
        self._slot_digests: Bits = np.zeros(shape, dtype=np.uint64)
        self._block_digests: Bits = np.zeros(settings.num_blocks, dtype=np.uint64)
        layout = f"mock/{self._pool.model}/{settings.block_size}/{settings.block_nbytes}"
        return RunnerInfo(
            name="mock",
            model=self._pool.model,
            layout=xxhash.xxh3_128_hexdigest(layout.encode()),
            block_size=settings.block_size,
            num_blocks=settings.num_blocks,
            block_nbytes=settings.block_nbytes,
            max_model_len=min(settings.max_model_len, self._pool.max_model_len or settings.max_model_len),
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            prefix_cache=settings.prefix_cache,
            vocab_size=settings.vocab_size,
        )

    async def run(self, rows: Sequence[Row]) -> list[Chosen]:
        """Write the rows' tokens, read what the sequences' blocks hold, take the time of the formula."""
        if any(self._settings.kill_token in row.token_ids for row in rows if len(row.token_ids) > 1):
            os.kill(os.getpid(), signal.SIGKILL)
        self._write(rows)
        sampling = [row for row in rows if row.draws]
        chosen = self._choose(sampling) if sampling else []
        await asyncio.sleep(self._duration_ms(rows) / 1000)  # also of 0: others must have their turn
        return chosen

    async def constrain(self, request: BackendInput, logs: Mapping[int, Sequence[int]]) -> Mapping[int, Constraint]:
        """Never asked: requests with a grammar are refused."""
        raise Unservable(f"request {request.request_id}: the mock engine has no grammars")

    def copy_block(self, source: int, target: int) -> None:
        """See `Runner.copy_block`."""
        self._data[target] = self._data[source]
        self._digest(np.array([target]))

    def clear(self, blocks: Sequence[int]) -> None:
        """See `Runner.clear`."""
        self._data[list(blocks)] = 0
        self._digest(np.array(blocks, dtype=np.int64))

    @property
    def device(self) -> None:
        """None: the blocks lie in host memory."""
        return None

    def gather(self, blocks: Sequence[int], out: Memory) -> None:
        """See `Runner.gather`."""
        target = np.frombuffer(host(out), dtype=np.uint64).reshape(len(blocks), *self._data.shape[1:])
        np.take(self._data, np.array(blocks, dtype=np.int64), axis=0, out=target, mode="clip")

    def scatter(self, data: Memory, blocks: Sequence[int]) -> None:
        """See `Runner.scatter`."""
        targets = np.array(blocks, dtype=np.int64)
        self._data[targets] = np.frombuffer(host(data), dtype=np.uint64).reshape(len(blocks), *self._data.shape[1:])
        self._digest(targets)

    async def close(self) -> None:
        """Nothing is held outside of this process's memory."""

    def _duration_ms(self, rows: Sequence[Row]) -> float:
        settings = self._settings
        prompt_tokens = sum(len(row.token_ids) for row in rows if len(row.token_ids) > 1)
        decoding = sum(len(row.token_ids) == 1 for row in rows)
        prefill_ms = settings.prefill_base_ms + prompt_tokens * settings.prefill_token_ms if prompt_tokens else 0.0
        decode_ms = settings.decode_base_ms + decoding * settings.decode_seq_ms if decoding else 0.0
        return prefill_ms + decode_ms

    def _write(self, rows: Sequence[Row]) -> None:
        """Put each token's bytes into its slot."""
        size = self._settings.block_size
        tokens, positions, blocks = array("Q"), array("Q"), array("q")
        for row in rows:
            count = len(row.token_ids)
            tokens.extend(row.token_ids)
            if count == 1:
                positions.append(row.start)
                blocks.append(row.table[row.start // size])
            else:
                positions.extend(range(row.start, row.start + count))
                blocks.extend(row.table[position // size] for position in range(row.start, row.start + count))
        at = np.frombuffer(positions, dtype=np.uint64)
        where = np.frombuffer(blocks, dtype=np.int64)
        slots = (at % np.uint64(size)).astype(np.int64)
        values = mix(np.frombuffer(tokens, dtype=np.uint64) * _TOKEN ^ at)
        self._data[where, slots] = values[:, None] * self._writers
        self._slot_digests[where, slots] = self._slot_digest(self._data[where, slots], slots)
        self._block_digests[where] = self._slot_digests[where].sum(axis=1)

    def _choose(self, rows: Sequence[Row]) -> list[Chosen]:
        """A token for each draw of the rows."""
        contents = self._contents(rows)
        draws = [draw for row in rows for draw in row.draws]
        counts = [len(row.draws) for row in rows]
        if len(draws) > len(rows):
            contents = np.repeat(contents, counts)
        keys = bits(draws)
        greedy = np.array([draw.options.temperature == 0 for draw in draws])
        if greedy.any():
            keys = np.where(greedy, np.array([draw.choice for draw in draws], dtype=np.uint64), keys)
        numbers = (mix(contents ^ mix(keys)) % np.uint64(self._settings.vocab_size)).tolist()
        return [self._allowed(number, draw) for number, draw in zip(numbers, draws, strict=True)]

    def _allowed(self, token: int, draw: Draw) -> int:
        """The next token id from here that may come: answers end by length or by a stop token, never by chance."""
        for _ in range(self._settings.vocab_size):
            if token not in draw.eos_token_ids and token not in draw.banned:
                break
            token = (token + 1) % self._settings.vocab_size
        return token

    def _contents(self, rows: Sequence[Row]) -> Bits:
        """For each row a digest of all bytes that its sequence has in its blocks, in order."""
        size = self._settings.block_size
        ids, ends, tails = array("q"), array("q"), array("q")
        for row in rows:
            length = row.start + len(row.token_ids)
            ids.extend(row.table[: -(-length // size)])
            ends.append(len(ids))
            tails.append((length - 1) % size + 1)
        blocks = np.frombuffer(ids, dtype=np.int64)
        stops = np.frombuffer(ends, dtype=np.int64)
        starts = np.concatenate((np.zeros(1, dtype=np.int64), stops[:-1]))
        digests = self._block_digests[blocks]
        in_use = np.arange(size) < np.frombuffer(tails, dtype=np.int64)[:, None]
        digests[stops - 1] = (self._slot_digests[blocks[stops - 1]] * in_use).sum(axis=1)
        order = np.arange(len(blocks)) - np.repeat(starts, stops - starts)
        return np.add.reduceat(mix(digests ^ order.astype(np.uint64) * _ORDER), starts)

    def _digest(self, blocks: NDArray[np.int64]) -> None:
        """Read these blocks again."""
        slots = np.arange(self._settings.block_size)
        self._slot_digests[blocks] = self._slot_digest(self._data[blocks], slots)
        self._block_digests[blocks] = self._slot_digests[blocks].sum(axis=1)

    def _slot_digest(self, data: Bits, slots: NDArray[np.int64]) -> Bits:
        digest: Bits = mix((data * self._readers).sum(axis=-1) ^ slots.astype(np.uint64))
        return digest
