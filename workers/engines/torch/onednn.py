"""Matrix products by oneDNN, in float32 on a CPU: the one place that names PyTorch's private operators for them.

PyTorch's public products go to MKL in float32, which is slow on processors that are not Intel's, and packs the weights anew in each call.
"""

from __future__ import annotations

import torch


def is_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch has these products, and they serve for such tensors."""
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def packed(weight: torch.Tensor) -> torch.Tensor:
    """A copy of `weight` [out, in] in oneDNN's own order, for `product` only."""
    copy: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return copy


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """rows @ weight.T + bias; a weight that is not packed must lie in one piece, as it is or transposed."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result
