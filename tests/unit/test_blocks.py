"""The block pool's books: references, cache, eviction."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.engines.paged.blocks import BlockPool, chain_hash, root_hash


def chain(*tokens: list[int], salt: str = "") -> list[bytes]:
    """Hashes of consecutive full blocks."""
    hashes = [root_hash(salt)]
    for block in tokens:
        hashes.append(chain_hash(hashes[-1], block))
    return hashes[1:]


def test_a_published_block_is_found_again_after_its_release() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(2)
    assert blocks is not None
    hashes = chain([1, 2], [3, 4])
    for block, digest in zip(blocks, hashes, strict=True):
        pool.publish(block, digest)
    pool.release(blocks)
    assert (pool.used, pool.free) == (0, 4)
    assert pool.match(hashes) == blocks
    assert pool.used == 2


def test_hashes_depend_on_all_that_precedes_and_on_the_salt() -> None:
    assert chain([1, 2], [3, 4])[1] != chain([9, 2], [3, 4])[1]
    assert chain([1, 2]) != chain([1, 2], salt="tenant")


def test_eviction_takes_the_least_recently_used_and_the_tail_of_a_chain_first() -> None:
    pool = BlockPool(3, 2)
    hashes = chain([1, 2], [3, 4], [5, 6])
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, digest in zip(blocks, hashes, strict=True):
        pool.publish(block, digest)
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[2]]
    assert pool.match(hashes) == blocks[:2]


def test_nothing_is_taken_where_not_all_can_be_had() -> None:
    pool = BlockPool(2, 2)
    assert pool.allocate(3) is None
    assert pool.free == 2


def test_equal_content_keeps_its_first_block() -> None:
    pool = BlockPool(2, 2)
    first, second = pool.allocate(2) or []
    [digest] = chain([1, 2])
    pool.publish(first, digest)
    pool.publish(second, digest)
    pool.release([first, second])
    pool.check_integrity()
    assert pool.match([digest]) == [first]


def test_without_a_prefix_cache_nothing_is_found() -> None:
    pool = BlockPool(2, 2, prefix_cache=False)
    [block] = pool.allocate(1) or []
    pool.publish(block, chain([1, 2])[0])
    assert pool.match(chain([1, 2])) == []


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "drop", "find"]), st.integers(0, 5)), max_size=60))
def test_the_books_add_up_whatever_happens(events: list[tuple[str, int]]) -> None:
    pool = BlockPool(6, 2)
    held: list[list[int]] = []
    for event, number in events:
        prompt = [[number, block] for block in range(number)]
        match event:
            case "take" if (blocks := pool.allocate(number)) is not None:
                for block, digest in zip(blocks, chain(*prompt), strict=True):
                    pool.publish(block, digest)
                held.append(blocks)
            case "share" if held:
                blocks = list(held[number % len(held)])
                pool.share(blocks)
                held.append(blocks)
            case "drop" if held:
                pool.release(held.pop(number % len(held)))
            case "find":
                known, _ = pool.peek(chain(*prompt))
                found = pool.match(chain(*prompt))
                assert len(found) == known
                held.append(found)
            case _:
                pass
        pool.check_integrity()
        assert pool.used == len({block for blocks in held for block in blocks})
    for blocks in held:
        pool.release(blocks)
    pool.check_integrity()
    assert pool.used == 0
