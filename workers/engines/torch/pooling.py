"""How the hidden states of a sequence become one vector: as sentence-transformers' files say, else as vLLM does by default."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from pipeline.errors import Unservable

# How sentence-transformers names them, in `pooling_mode` or as a flag of its own.
MODES = {
    "lasttoken": "last", "pooling_mode_lasttoken": "last", "mean": "mean", "pooling_mode_mean_tokens": "mean",
    "cls": "cls", "pooling_mode_cls_token": "cls",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pooling:
    """`mode`: "last" (token), "mean" or "cls" (the first token); `is_normalized`: vectors have length 1."""

    mode: str = "last"
    is_normalized: bool = True

    def vectors(self, hidden: torch.Tensor, bounds: Sequence[int]) -> torch.Tensor:
        """[total, hidden size] of sequences between `bounds` -> [sequences, hidden size], float32. Not yet normalized."""
        if self.mode == "mean":
            return torch.stack([hidden[first:last].float().mean(dim=0) for first, last in pairwise(bounds)])
        rows = [last - 1 for last in bounds[1:]] if self.mode == "last" else list(bounds[:-1])
        return hidden[torch.tensor(rows, device=hidden.device)].float()


def pooling_of(name: str, place: str, wanted: str) -> Pooling:
    """The pooling of a model: what is `wanted`, else ("auto") what the model's own files say, else its last token.

    A model that comes with sentence-transformers' modules is normalized only where they say so, any other always. Raises `Unservable`
    for a pooling that is not known here.
    """
    modules = _read(place, "modules.json")
    if not isinstance(modules, list):
        return Pooling("last" if wanted == "auto" else wanted)
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module for module in modules}
    is_normalized = "Normalize" in kinds
    if wanted != "auto" or "Pooling" not in kinds:
        return Pooling("last" if wanted == "auto" else wanted, is_normalized)
    config = _read(place, f"{kinds['Pooling'].get('path', '1_Pooling')}/config.json")
    modes = _modes(config if isinstance(config, dict) else {})
    if len(modes) != 1 or modes[0] not in MODES:
        raise Unservable(
            f"model {name}: it pools by {' and '.join(modes) or 'nothing that is said'}; known are last, mean and cls: "
            "set pools.<name>.pooling to one of them"
        )
    return Pooling(MODES[modes[0]], is_normalized)


def _modes(config: dict[str, Any]) -> list[str]:
    """The ways that are switched on."""
    named = config.get("pooling_mode")
    if named:
        return [named] if isinstance(named, str) else list(named)
    return [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]


def _read(place: str, name: str) -> Any:
    path = cached_file(place, name, _raise_exceptions_for_missing_entries=False)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
