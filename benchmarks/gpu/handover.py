"""A hand-over alone: one request at a time on an idle system, for prompts of several sizes.

Of Baton by Redis's stamps and the workers' counters; the time of an export is that of the prefill task of a request that goes on less
that of one that ends with its first token, which is not exported. For both systems: how long decode's first token takes after prefill was
done (Baton's first token has left by then; of vLLM's pair it is the first token).
"""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.gpu.baton import BatonSystem
from benchmarks.gpu.load import Kind, Seen, Target, at_once, run
from benchmarks.gpu.plain import PlainSystem
from benchmarks.gpu.shapes import Shape

NEW_TOKENS = 8


async def handovers(
    system: BatonSystem | PlainSystem, shape: Shape, sizes: list[int], repeats: int
) -> list[dict[str, Any]]:
    """A row for each size; the first request of each is not counted."""
    rows = []
    for size in sizes:
        row: dict[str, Any] = {"prompt_tokens": size, "nbytes": shape.kv_nbytes(size)}
        if isinstance(system, BatonSystem):
            row |= await _of_baton(system, shape, size, repeats)
        else:
            row |= await _of_pair(system, shape, size, repeats)
        print(f"hand-over alone, {size} tokens: {row}", flush=True)
        rows.append(row)
    return rows


async def _of_baton(system: BatonSystem, shape: Shape, size: int, repeats: int) -> dict[str, Any]:
    await _one_by_one(system.target, shape, size, NEW_TOKENS, 1)
    await system.before()
    seen = await _one_by_one(system.target, shape, size, NEW_TOKENS, repeats)
    counted = (await system.after(seen))["fetched"]
    alone = await _one_by_one(system.target, shape, size, 1, repeats)
    prefill_ms = await _span_ms(system, seen, "claimed_prefill", "handover")
    computing_ms = await _span_ms(system, alone, "claimed_prefill", "ended")
    export_ms = max(0.0, prefill_ms - computing_ms)
    return {
        "first_token_ms": _median_ms([one.arrivals[0][0] - one.sent_s for one in seen]),
        "prefill_and_export_ms": prefill_ms,
        "prefill_alone_ms": computing_ms,
        "export_ms": round(export_ms, 3),
        "export_gb_per_s": round(shape.kv_nbytes(size) / export_ms / 1e6, 3) if export_ms else None,
        "claim_ms": await _span_ms(system, seen, "handover", "claimed_decode"),
        "claim_to_fetched_ms": await _span_ms(system, seen, "claimed_decode", "fetched"),
        "fetched": counted,
        "decodes_first_token_ms": _median_ms([_second_token_s(one) for one in seen]),
    }


async def _of_pair(system: PlainSystem, shape: Shape, size: int, repeats: int) -> dict[str, Any]:
    await _one_by_one(system.target, shape, size, NEW_TOKENS, 1)
    seen = await _one_by_one(system.target, shape, size, NEW_TOKENS, repeats)
    after_ms = _median_ms([one.arrivals[0][0] - one.prefilled_s for one in seen])
    return {
        "first_token_ms": _median_ms([one.arrivals[0][0] - one.sent_s for one in seen]),
        "prefill_and_export_ms": _median_ms([one.prefilled_s - one.sent_s for one in seen]),
        "decodes_first_token_ms": after_ms,
        "gb_per_s_with_a_step": round(shape.kv_nbytes(size) / after_ms / 1e6, 3),
    }


async def _one_by_one(target: Target, shape: Shape, size: int, new_tokens: int, count: int) -> list[Seen]:
    kind = Kind("alone", size, new_tokens)
    seen = []
    for due in at_once(kind, count, shape.vocab):
        seen += await run([due], target)
    for one in seen:
        if not one.is_whole:
            raise RuntimeError(f"a hand-over of {size} tokens alone failed: {one.error or one.tokens}")
    return seen


def _second_token_s(one: Seen) -> float:
    first_s, count = one.arrivals[0]
    return 0.0 if count > 1 else one.arrivals[1][0] - first_s


async def _span_ms(system: BatonSystem, seen: list[Seen], begin: str, end: str) -> float:
    timelines = [await system.timeline(one.request_id) for one in seen]
    spans = [(getattr(t, begin), getattr(t, end)) for t in timelines if t is not None]
    return _median_ms([(b - a) / 1e6 for a, b in spans if a and b])


def _median_ms(seconds: list[float]) -> float:
    return round(1e3 * median(seconds), 3) if seconds else 0.0
