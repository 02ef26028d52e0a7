"""What the command line of `gpu_disagg.py` says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import SHAPES, Shape

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
DRY_RUN = {"rates": "1+0.2,2+0.4", "seconds": 4.0, "chat": "64,16", "long": "512,8", "sizes": "64,256,1024"}
FULL = {"rates": "8+1,16+2,24+3", "seconds": 20.0, "chat": "512,128", "long": "8192,64", "sizes": "512,2048,8192"}
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
ON_CPU = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every configuration."""
    parser.add_argument("--model", choices=SHAPES, default="8b", help="tiny: for a dry run; it also shortens the load")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", default="0,1", help="the two GPUs; of a pair the first one prefills")
    parser.add_argument(
        "--visible", choices=("own", "all"), default="own",
        help="own: a process sees its GPU alone; all: both, its own first",
    )  # fmt: skip
    parser.add_argument("--gpu-memory", type=float, default=0.8, help="share of a GPU that an engine may take")
    parser.add_argument("--batched-tokens", type=int, default=0, help="tokens in a step (8192; 512 on a CPU)")
    parser.add_argument("--num-seqs", type=int, default=256, help="sequences in a step")
    parser.add_argument("--block-size", type=int, default=0, help="0: vLLM's own choice (32 on a CPU)")
    parser.add_argument("--engine-args", default="{}", help="more of vLLM's engine arguments, a JSON object")
    parser.add_argument("--rates", default="", help="chat+long requests a second: 8+1,16+2,24+3")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long each rate lasts (20)")
    parser.add_argument("--chat", default="", help="prompt and output tokens of a chat: 512,128")
    parser.add_argument("--long", default="", help="prompt and output tokens of a long request: 8192,64")
    parser.add_argument("--sizes", default="", help="prompts of the lone hand-overs: 512,2048,8192")
    parser.add_argument("--repeats", type=int, default=5, help="lone hand-overs of each size")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=480.0, help="no rate is begun that could end after this")
    parser.add_argument("--start-s", type=float, default=240.0, help="longest wait for the engines")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--logs", type=Path, default=None, help="folder of the logs (a temporary one)")
    parser.add_argument("--label", default="", help="added to the result's name")
    parser.add_argument("--commit", default="", help="where git cannot tell it")


def add_baton(parser: argparse.ArgumentParser) -> None:
    """Options of what runs behind Baton."""
    parser.add_argument("--redis-server", default="", help="the program (else the one on PATH)")
    parser.add_argument("--arena-gib", type=float, default=0.0, help="memory of the transfer on each side (8; 0.25)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="a setting of Baton: KEY=VALUE")


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Options of a prefill and a decode worker."""
    parser.add_argument("--transfer", default="auto", help="transfer.kind: auto, cuda_ipc, shm, tcp, nixl")
    parser.add_argument(
        "--decode-batched-tokens", type=int, default=0, help="tokens in a step of the decode engine (512), so the chunk "
        "in which short prompts are prefilled there",
    )  # fmt: skip


def complete(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fill in what follows from the model and the device."""
    for name, value in (FULL if arguments.model == "8b" else DRY_RUN).items():
        setattr(arguments, name, getattr(arguments, name) or value)
    is_cpu = arguments.device == "cpu"
    arguments.batched_tokens = arguments.batched_tokens or (512 if is_cpu else 8192)
    arguments.block_size = arguments.block_size or (32 if is_cpu else 0)
    if hasattr(arguments, "arena_gib"):
        arguments.arena_gib = arguments.arena_gib or (0.25 if is_cpu else 8.0)
    if hasattr(arguments, "decode_batched_tokens"):
        arguments.decode_batched_tokens = arguments.decode_batched_tokens or 512
    return arguments


def shape_of(arguments: argparse.Namespace) -> Shape:
    """The model."""
    return SHAPES[arguments.model]


def extra_engine_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What vLLM is told beside sizes: no weights, and CUDA graphs of decode steps alone, which start soonest."""
    graphs = (
        {} if arguments.device == "cpu" else {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY", "mode": 0}}
    )
    return {"load_format": "dummy", **graphs, **json.loads(arguments.engine_args)}


def environment(arguments: argparse.Namespace, place: int) -> dict[str, str]:
    """Variables of the engine on the first (0) or second (1) GPU."""
    if arguments.device == "cpu":
        return {**QUIET, **ON_CPU}
    gpus = arguments.gpus.split(",")
    mine = gpus[place % len(gpus)]
    seen = [mine] if arguments.visible == "own" else [mine, *(gpu for gpu in gpus if gpu != mine)]
    return {**QUIET, "CUDA_VISIBLE_DEVICES": ",".join(seen)}


def pair_of_ints(text: str) -> tuple[int, int]:
    """`512,128`"""
    first, second = text.split(",")
    return int(first), int(second)
