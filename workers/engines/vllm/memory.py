"""vLLM's paged memory as blocks of bytes.

vLLM keeps one tensor a layer; the first dimension counts blocks. How keys and values lie inside a block is a matter of its attention
kernels, which may pack them, so blocks are copied whole and as bytes. A run of blocks on the wire is layer after layer, and within a
layer block after block: `[layers, blocks, bytes of a block in that layer]`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pipeline.errors import Unservable


class PagedMemory:
    """The blocks of one engine. `layers` are vLLM's tensors by name, each of `[num_blocks, ...]`."""

    def __init__(self, layers: Mapping[str, torch.Tensor]) -> None:
        names = sorted(layers)
        self._layers = [as_bytes(name, layers[name]) for name in names]
        self.num_blocks = self._layers[0].shape[0]
        self.block_nbytes = sum(layer.shape[1] for layer in self._layers)
        self.order = [(tuple(layers[n].shape[1:]), layers[n].stride()[1:], str(layers[n].dtype)) for n in names]

    def gather(self, blocks: Sequence[int], out: memoryview) -> None:
        """Copy these blocks into `out` (format "B", `len(blocks) * block_nbytes` bytes)."""
        target, at = np.frombuffer(out, dtype=np.uint8), 0
        for layer in self._layers:
            rows = target[at : at + len(blocks) * layer.shape[1]].reshape(len(blocks), -1)
            if layer.device.type == "cpu":
                np.take(layer.numpy(), blocks, axis=0, out=rows, mode="clip")  # any other mode copies through a buffer
            else:
                index = torch.tensor(blocks, device=layer.device)
                torch.from_numpy(rows).copy_(layer.index_select(0, index))
            at += rows.nbytes

    def scatter(self, data: memoryview, blocks: Sequence[int], skip: int = 0) -> None:
        """Copy `data`, a run of `len(blocks)` blocks, into these blocks, but for the first `skip` of them."""
        source, at = np.frombuffer(data, dtype=np.uint8), 0
        for layer in self._layers:
            rows = source[at : at + len(blocks) * layer.shape[1]].reshape(len(blocks), -1)
            if layer.device.type == "cpu":
                layer.numpy()[blocks[skip:]] = rows[skip:]
            else:
                index = torch.tensor(blocks[skip:], device=layer.device)
                layer.index_copy_(0, index, torch.from_numpy(rows[skip:].copy()).to(layer.device))
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
