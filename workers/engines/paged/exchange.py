"""What a transfer sees of an engine's memory: some blocks to read, some blocks to fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from workers.engines.paged.runner import Runner
from workers.transfer import Memory, part


class Readable(Protocol):
    """Memory of blocks, as a runner has it."""

    @property
    def device(self) -> int | None:
        """The GPU that it is of."""
        ...

    def gather(self, blocks: Sequence[int], out: Memory) -> None:
        """Copy these blocks into `out`, in the order in which the other side takes them."""
        ...


class ExportedBlocks:
    """A `BlockSource` over blocks of an engine's memory."""

    def __init__(
        self,
        memory: Readable,
        *,
        request_id: str,
        layout: str,
        blocks: list[int],
        block_nbytes: int,
        num_tokens: int,
        cached_tokens: int,
    ) -> None:
        self._memory = memory
        self._blocks = blocks
        self.device = memory.device
        self.request_id = request_id
        self.layout = layout
        self.num_tokens = num_tokens
        self.num_blocks = len(blocks)
        self.nbytes = len(blocks) * block_nbytes
        self.cached_tokens = cached_tokens

    def gather(self, out: Memory) -> None:
        """See `BlockSource.gather`."""
        self._memory.gather(self._blocks, out)


class FetchedBlocks:
    """A `BlockSink` over the blocks of a table, of which the first `skip` are filled already."""

    def __init__(self, runner: Runner, *, layout: str, blocks: list[int], block_nbytes: int, skip: int) -> None:
        self._runner = runner
        self._blocks = blocks
        self._skip = skip
        self._block_nbytes = block_nbytes
        self.device = runner.device
        self.layout = layout
        self.nbytes = len(blocks) * block_nbytes

    def scatter(self, data: Memory) -> None:
        """See `BlockSink.scatter`."""
        if self._skip < len(self._blocks):
            skipped = self._skip * self._block_nbytes
            self._runner.scatter(part(data, skipped, self.nbytes - skipped), self._blocks[self._skip :])
