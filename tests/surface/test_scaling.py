"""`/v1/scaling/{pool}` and the metrics beside it: what KEDA and Prometheus read."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pipeline.redis_server import RedisServer
from pipeline.scaling.lease import ScalerLease
from pipeline.scaling.memory import Memory
from pipeline.scaling.policy import Decision, StageDecision
from tests.serving import serving
from tests.system import POOL, collect, request

QUICK = ("autoscale.poll_s=0.2", "engine.mock.decode_base_ms=5")


async def test_what_waits_without_workers_asks_for_them(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with serving(default_redis_server, tmp_path, *QUICK, stages="") as served, served.http() as http:
        idle = (await http.get(f"/v1/scaling/{POOL}")).json()
        assert {stage: said["desired"] for stage, said in idle["stages"].items()} == {"prefill": 0, "decode": 0}
        async with served.system.client() as client:
            streams = [await client.submit(request(50)) for _ in range(3)]

            async def is_asked_for() -> bool:
                said = (await http.get(f"/v1/scaling/{POOL}")).json()["stages"]["prefill"]
                return bool(said["desired"] >= 1 and said["lanes"]["default"]["waiting"] == 3)

            await served.system.until(is_asked_for, 10)
            said = (await http.get(f"/v1/scaling/{POOL}")).json()
            prefill = said["stages"]["prefill"]
            assert prefill["why"]
            assert prefill["lanes"]["default"]["prompt_tokens"] == 150
            assert prefill["lanes"]["default"]["oldest_s"] > 0
            metrics = (await http.get("/metrics")).text
            assert f'baton_desired_workers{{pool="{POOL}",stage="prefill"}}' in metrics
            assert f'baton_oldest_waiting_seconds{{lane="default",pool="{POOL}",stage="prefill"}}' in metrics
            await asyncio.gather(*(served.system.worker(stage) for stage in ("prefill", "decode")))
            assert {(await collect(stream))[1].state for stream in streams} == {"done"}


async def test_who_scales_the_pool_is_believed_as_long_as_it_does(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with serving(default_redis_server, tmp_path, *QUICK, stages="") as served, served.http() as http:

        async def told() -> tuple[int, bool]:
            said = (await http.get(f"/v1/scaling/{POOL}")).json()["stages"]["decode"]
            return said["desired"], said["why"] == "much to do"

        async def is_told(*expected: object) -> bool:
            return await told() == expected

        lease = ScalerLease(served.system.connection, POOL)
        await lease.take()
        much = Decision(StageDecision(1, 1, "calm"), StageDecision(0, 5, "much to do"), Memory())
        now_ms = int((await served.system.connection.command("TIME"))[0]) * 1000
        await lease.tell(much, now_ms - 60_000)
        await asyncio.sleep(1)  # some looks: what was decided long ago is of one before
        assert (await told())[1] is False
        await lease.tell(much, now_ms)
        await served.system.until(lambda: is_told(5, True), 10)
        assert f'baton_desired_workers{{pool="{POOL}",stage="decode"}} 5.0' in (await http.get("/metrics")).text
        await lease.give_up()
        await served.system.until(lambda: is_told(0, False), 10)


async def test_a_pool_that_is_none_is_a_404(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with serving(default_redis_server, tmp_path, stages="") as served, served.http() as http:
        answer = await http.get("/v1/scaling/none")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
