"""vLLM's paged memory as blocks of bytes.

vLLM keeps one tensor a layer; the first dimension counts blocks. How keys and values lie inside a block is a matter of its attention
kernels, which may pack them, so blocks are copied whole and as bytes. A run of blocks on the wire is layer after layer, and within a
layer block after block: `[layers, blocks, bytes of a block in that layer]`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.errors import Unservable
from workers.engines.device_copies import DeviceCopies
from workers.transfer import Memory, host


class PagedMemory:
    """The blocks of one engine. `layers` are vLLM's tensors by name, each of `[num_blocks, ...]`."""

    def __init__(self, layers: Mapping[str, torch.Tensor]) -> None:
        names = sorted(layers)
        self._layers = [as_bytes(name, layers[name]) for name in names]
        self.num_blocks = self._layers[0].shape[0]
        self.block_nbytes = sum(layer.shape[1] for layer in self._layers)
        self._copies = DeviceCopies(self._layers) if self._layers[0].device.type == "cuda" else None
        self.order = [(tuple(layers[n].shape[1:]), layers[n].stride()[1:], str(layers[n].dtype)) for n in names]

    @property
    def device(self) -> int | None:
        """The GPU that the blocks lie on."""
        return None if self._copies is None else self._copies.device.index

    def now(self) -> Any:
        """This moment in vLLM's stream of work, for `scatter`; called on vLLM's thread."""
        return None if self._copies is None else torch.cuda.current_stream(self._copies.device).record_event()

    def gather(self, blocks: Sequence[int], out: Memory) -> None:
        """Copy these blocks into `out` (`len(blocks) * block_nbytes` bytes)."""
        if self._copies is not None:
            self._copies.gather(blocks, out)
            return
        target, at = np.frombuffer(host(out), dtype=np.uint8), 0
        for layer in self._layers:
            rows = target[at : at + len(blocks) * layer.shape[1]].reshape(len(blocks), -1)
            np.take(layer.numpy(), blocks, axis=0, out=rows, mode="clip")  # any other mode copies through a buffer
            at += rows.nbytes

    def scatter(self, data: Memory, blocks: Sequence[int], skip: int = 0, after: Any = None) -> None:
        """Copy `data`, a run of `len(blocks)` blocks, into these blocks, but for the first `skip` of them.

        `after`: the moment at which they were given. Work that was begun before may still write into them: a step that runs ahead
        does not know yet that the request whose blocks they were has ended.
        """
        if self._copies is not None:
            self._copies.scatter(data, blocks, skip, after)
            return
        source, at = np.frombuffer(host(data), dtype=np.uint8), 0
        for layer in self._layers:
            rows = source[at : at + len(blocks) * layer.shape[1]].reshape(len(blocks), -1)
            layer.numpy()[blocks[skip:]] = rows[skip:]
            at += rows.nbytes


def as_bytes(name: str, layer: torch.Tensor) -> torch.Tensor:
    """A layer's tensor as `[blocks, bytes]` over the same memory. Raises `Unservable` where a block is not one run of bytes."""
    elements = layer[0].numel()
    if layer.stride(0) < elements or not is_dense(layer[0]):
        shape = f"{tuple(layer.shape)}, strides {layer.stride()}"
        raise Unservable(
            f"vLLM lays out {name} as {shape}: its blocks are not runs of bytes, so they cannot be handed over"
        )
    return torch.as_strided(layer, (layer.shape[0], elements), (layer.stride(0), 1)).view(torch.uint8)


def is_dense(block: torch.Tensor) -> bool:
    """Whether the elements of a tensor fill one run of memory, in whatever order of its dimensions."""
    expected = 1
    for stride, length in sorted(zip(block.stride(), block.shape, strict=True)):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True


def fingerprint(memory: PagedMemory, *facts: object) -> str:
    """What has to be equal on both sides of a transfer: the order of bytes in a block, and what they were computed from."""
    return "vllm-" + hashlib.sha256(repr((memory.order, *facts)).encode()).hexdigest()[:24]
