"""Limits of handlers: told at the soft one, stopped at the hard one, and a cancellation from outside stays one."""

from __future__ import annotations

import asyncio

import pytest

from pipeline.errors import HandlerStuck, SoftTimeLimitExceeded, TimeLimitExceeded
from workers import limits
from workers.limits import TimeLimits, in_thread, run_within


async def test_what_ends_in_time_is_left_alone() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await run_within(TimeLimits(), "t", work()) == 7
    assert await run_within(TimeLimits(30, 60), "t", work()) == 7

    async def fail() -> int:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await run_within(TimeLimits(30, 60), "t", fail())


async def test_the_soft_limit_is_no_cancellation_for_what_runs_inside() -> None:
    async def work() -> list[str]:
        seen = []
        try:
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(60))
                await asyncio.sleep(60)
        except* SoftTimeLimitExceeded as errors:
            seen += [str(error) for error in errors.exceptions]
        async with asyncio.timeout(0.01):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                seen.append("a time-out of its own")
                raise
        return seen

    with pytest.raises(TimeoutError):
        await run_within(TimeLimits(soft_s=0.05), "t", work())

    async def polite() -> int:
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            task = asyncio.current_task()
            assert task is not None
            return task.cancelling()
        return -1

    assert await run_within(TimeLimits(soft_s=0.05), "t", polite()) == 0


async def test_a_handler_inside_a_soft_limit_sees_errors_of_what_it_awaits() -> None:
    async def work() -> str:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_exception, ValueError("of the future"))
        try:
            await future
        except ValueError as error:
            return str(error)
        return ""

    assert await run_within(TimeLimits(soft_s=30), "t", work()) == "of the future"


async def test_the_hard_limit_holds_whatever_the_handler_makes_of_it() -> None:
    async def work() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "as if nothing were"
        return "slept"

    with pytest.raises(TimeLimitExceeded, match=r"time limit of 0.05 s passed in t"):
        await run_within(TimeLimits(hard_s=0.05), "t", work())


async def test_one_that_does_not_end_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "END_WITHIN_S", 0.1)
    free = asyncio.Event()

    async def work() -> None:
        while not free.is_set():
            try:
                await free.wait()
            except asyncio.CancelledError:
                continue

    with pytest.raises(HandlerStuck, match=r"time limit of 0.05 s passed in t"):
        await run_within(TimeLimits(hard_s=0.05), "t", work())
    free.set()


@pytest.mark.parametrize("chosen", [TimeLimits(), TimeLimits(30, 60), TimeLimits(hard_s=60)])
async def test_a_cancellation_from_outside_reaches_the_handler(chosen: TimeLimits) -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    job = asyncio.create_task(run_within(chosen, "t", work()))
    await asyncio.sleep(0.05)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert seen == ["cancelled"]


async def test_a_thread_keeps_its_place_until_it_ends() -> None:
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    job = asyncio.create_task(in_thread(ended))
    for _ in range(2):
        await asyncio.sleep(0)
        job.cancel()
        await asyncio.sleep(0.01)
    assert not job.done()
    ended.set_result(1)
    with pytest.raises(asyncio.CancelledError):
        await job


@pytest.mark.parametrize(("soft_s", "hard_s"), [(0, None), (None, -1), (5, 5), (6, 5)])
def test_limits_that_make_no_sense_are_refused(soft_s: float | None, hard_s: float | None) -> None:
    with pytest.raises(ValueError, match=r"time limit"):
        TimeLimits(soft_s, hard_s)
