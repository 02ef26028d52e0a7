"""The block pool: who holds which block, and which full blocks can be found again by their content.

A block is in one of three places:

    free      nobody holds it and its content means nothing
    held      its reference count is at least 1; several sequences may hold the same block
    cached    nobody holds it, but its content is known by hash and may be taken again; the oldest goes first when blocks run out

The pool knows nothing of bytes. It is used from one thread.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import xxhash

from pipeline.protocol import pack_tokens


def new_table(blocks: Iterable[int] = ()) -> array[int]:
    """Block ids in order of a sequence; an array, because it is sliced and joined in each step."""
    return array("q", blocks)


def root_hash(salt: str) -> bytes:
    """Where a chain of block hashes starts: requests with different salts never share blocks."""
    return xxhash.xxh3_128_digest(salt.encode())


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full block (16 bytes): of its tokens and of everything before them."""
    return xxhash.xxh3_128_digest(parent + pack_tokens(token_ids))


class BlockPool:
    """Reference counts, free list and prefix cache over `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced, findable; oldest first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that `allocate` can give: free now or by eviction."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.free

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks, each held once, of undefined content; None (and nothing taken) where there are not so many."""
        if count > self.free:
            return None
        return [self._take() for _ in range(count)]

    def share(self, blocks: Iterable[int]) -> None:
        """Hold each of these held blocks once more."""
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give each up once. Later blocks of a table become older in the cache, since they are of no use without the earlier."""
        references = self._references
        for block in reversed(blocks):
            references[block] -= 1
            if references[block]:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix of this chain, each now held once more."""
        found: list[int] = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        for block in found:
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1
        return found

    def peek(self, hashes: Sequence[bytes]) -> tuple[int, int]:
        """Length of the longest known prefix in blocks, and how many of those nobody holds. Takes nothing."""
        known = unheld = 0
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            known += 1
            unheld += not self._references[block]
        return known, unheld

    def publish(self, block: int, digest: bytes) -> None:
        """Make a held, full block findable. Where that content is already known under another block, that one stays."""
        if self.prefix_cache and digest not in self._block_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def forget(self, blocks: Iterable[int]) -> list[int]:
        """Nobody may find these held blocks any more; returns those that are held only once."""
        for block in blocks:
            if block in self._hash_of:
                del self._block_of[self._hash_of.pop(block)]
        return [block for block in blocks if self._references[block] == 1]

    def check_integrity(self) -> None:
        """Raise AssertionError where the books do not add up: each block is in exactly one place, each hash in both maps."""
        free, cached = set(self._free), set(self._cached)
        held = {block for block, count in enumerate(self._references) if count}
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert not free & cached, "a block is free and cached"
        assert not held & (free | cached), "a held block is free or cached"
        assert len(free) + len(cached) + len(held) == self.num_blocks, "a block is nowhere"
        assert all(count >= 0 for count in self._references), "a reference count below 0"
        assert {block: digest for digest, block in self._block_of.items()} == self._hash_of, "hash maps differ"
        assert cached <= self._hash_of.keys(), "a cached block without a hash"
        assert not free & self._hash_of.keys(), "a free block with a hash"

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._references[block] = 1
        return block
