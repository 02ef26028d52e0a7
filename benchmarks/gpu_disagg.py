"""Baton with vLLM on two GPUs of one host, beside plain vLLM: one configuration a command, merged afterwards.

    python -m benchmarks.gpu_disagg aggregated                                 # two decode workers that prefill by themselves
    python -m benchmarks.gpu_disagg disagg --transfer cuda_ipc --max-local 0,512   # a prefill and a decode worker
    python -m benchmarks.gpu_disagg plain                                      # two engines of vLLM in turn, without Baton
    python -m benchmarks.gpu_disagg plain-nixl                                 # a prefill and a decode engine with vLLM's NixlConnector
    python -m benchmarks.gpu_disagg handover --transfer shm                    # hand-overs alone; --transfer vllm-nixl: of vLLM's
    python -m benchmarks.gpu_disagg merge

The model is a Llama of 8 B parameters without weights (`--model tiny --device cpu` for a dry run). Prompts and answers are token ids,
lengths are exact. What is measured and how it counts: `gpu/load.py`, `gpu/figures.py`, `gpu/handover.py`. Each rate is written as soon as
it is over.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.baton import BatonSystem
from benchmarks.gpu.figures import figures
from benchmarks.gpu.fleet import Fleet
from benchmarks.gpu.handover import handovers
from benchmarks.gpu.load import DRAIN_S, Kind, at_once, plan, run_apart
from benchmarks.gpu.merge import merge
from benchmarks.gpu.options import RESULTS, add_baton, add_common, add_pair, complete, pair_of_ints, shape_of
from benchmarks.gpu.plain import PlainSystem
from benchmarks.gpu.results import Results
from pipeline.config import LogSettings
from pipeline.logs import configure

System = BatonSystem | PlainSystem
WARM_UP = ((16, 2), (8, 2), (32, 1))  # chats and long prompts at once, round after round
ALL_REMOTE = 0


def main() -> None:
    """One configuration, or the merging of all."""
    configure(LogSettings(level="warning"), "benchmark")
    arguments = parse()
    if arguments.command == "merge":
        merge(arguments.out, arguments.target)
        return
    arguments.began_s = time.monotonic()
    asyncio.run(measure(complete(arguments)))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_disagg", description="Baton and vLLM on two GPUs")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("aggregated", "disagg", "handover", "plain", "plain-nixl"):
        command = commands.add_parser(name)
        add_common(command)
        if name in ("aggregated", "disagg", "handover"):
            add_baton(command)
        if name in ("disagg", "handover"):
            add_pair(command)
        if name == "disagg":
            command.add_argument("--max-local", default="0", help="longest prompt that decode prefills; several: 0,512")
        if name in ("disagg", "plain-nixl"):
            command.add_argument("--no-handover", action="store_true", help="leave out the hand-overs alone")
    merging = commands.add_parser("merge")
    merging.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    merging.add_argument("--target", type=Path, default=RESULTS.parent / "gpu_disagg", help="without its ending")
    return parser.parse_args()


async def measure(arguments: argparse.Namespace) -> None:
    """Start the system, warm it up, measure hand-overs and rates."""
    results = Results(arguments.command, arguments)
    with tempfile.TemporaryDirectory(prefix="baton-model-") as folder:
        model = shape_of(arguments).write(Path(folder) / "model")
        logs = arguments.logs or Path(tempfile.mkdtemp(prefix=f"baton-{arguments.command}-logs-"))
        print(f"logs in {logs}", flush=True)
        with Fleet(logs) as fleet:
            async with system_of(arguments, fleet, model) as system:
                say(arguments, "ready")
                await warm_up(arguments, system)
                say(arguments, "warm")
                await measure_all(arguments, system, results)
    say(arguments, f"written to {results.path}")


def system_of(arguments: argparse.Namespace, fleet: Fleet, model: Path) -> System:
    """What the command names, not yet started."""
    if arguments.command == "aggregated":
        return BatonSystem(arguments, fleet, model, stages=("decode", "decode"))
    if arguments.command in ("plain", "plain-nixl"):
        return PlainSystem(arguments, fleet, model, has_nixl=arguments.command == "plain-nixl")
    if arguments.command == "handover" and arguments.transfer == "vllm-nixl":
        return PlainSystem(arguments, fleet, model, has_nixl=True)
    return BatonSystem(arguments, fleet, model, stages=("prefill", "decode"))


async def measure_all(arguments: argparse.Namespace, system: System, results: Results) -> None:
    """Hand-overs alone, then each rate; with Baton's pair, each rate for each length that decode prefills by itself."""
    if arguments.command == "handover" or not getattr(arguments, "no_handover", True):
        sizes = [int(size) for size in arguments.sizes.split(",")]
        results.add("handovers", *await handovers(system, shape_of(arguments), sizes, arguments.repeats))
    if arguments.command == "handover":
        return
    for max_local in [int(tokens) for tokens in getattr(arguments, "max_local", "-1").split(",")]:
        if isinstance(system, BatonSystem) and max_local > ALL_REMOTE:
            await system.set_max_local(max_local)
            await warm_up(arguments, system)
        for rate in arguments.rates.split(","):
            if time.monotonic() - arguments.began_s + arguments.seconds + DRAIN_S > arguments.limit_s:
                say(arguments, f"{rate}: left out, it could end after --limit-s")
                continue
            row = await one_rate(arguments, system, rate)
            results.add("rates", {"rate": rate, **({"max_local": max_local} if max_local >= 0 else {}), **row})


async def warm_up(arguments: argparse.Namespace, system: System) -> None:
    """Both engines have seen prompts and batches of all sizes, kernels are compiled, connections are open."""
    chat, long = kinds(arguments)
    vocab = shape_of(arguments).vocab
    for chats, longs in WARM_UP:
        requests = at_once(chat, chats, vocab) + at_once(long, longs, vocab)
        seen = await asyncio.to_thread(run_apart, requests, system.target)
        if failed := [one.error or f"{one.tokens} tokens" for one in seen if not one.is_whole]:
            raise RuntimeError(f"warming up: {len(failed)} of {len(seen)} requests failed: {failed[0]}")


async def one_rate(arguments: argparse.Namespace, system: System, rate: str) -> dict[str, Any]:
    """One rate of chats and long requests."""
    chat, long = (
        dataclasses.replace(kind, per_s=float(per_s))
        for kind, per_s in zip(kinds(arguments), rate.split("+"), strict=True)
    )
    requests = plan([chat, long], arguments.seconds, shape_of(arguments).vocab, arguments.seed)
    await system.before()
    seen = await asyncio.to_thread(run_apart, requests, system.target)
    row = figures(seen, arguments.seconds) | await system.after(seen)
    say(arguments, f"{rate}: {brief(row)}")
    return row


def brief(row: dict[str, Any]) -> str:
    """One line of a rate."""
    parts = [f"{row['whole']} of {row['requests']} whole, {row['tokens_per_s']:,.0f} tokens/s"]
    for name, kind in row["kinds"].items():
        parts.append(f"{name} TTFT {kind['ttft_ms']} ITL {kind['itl_ms']}")
    parts.append(f"good {row['good_by_tpot']} ({row['good_by_itl_p99']} by p99 of ITLs), late {row['sent_late_ms']}")
    parts += [f"fetched {row['fetched']}"] if row.get("fetched") else []
    parts += [f"failed {row['failed']}"] if row["failed"] else []
    return "; ".join(parts)


def kinds(arguments: argparse.Namespace) -> tuple[Kind, Kind]:
    """Chats and long requests."""
    return Kind("chat", *pair_of_ints(arguments.chat)), Kind("long", *pair_of_ints(arguments.long))


def say(arguments: argparse.Namespace, what: str) -> None:
    """A line with the time since the start."""
    print(f"[{time.monotonic() - arguments.began_s:5.1f} s] {arguments.command} {what}", flush=True)


if __name__ == "__main__":
    main()
