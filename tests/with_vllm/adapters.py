"""LoRA adapters of the built-in model, made when a test needs them, and the model with one of them merged into its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.builtin import builtin_model_path

RANK, ALPHA = 4, 8
MODULES = ("q_proj", "v_proj")
LAYERS = 5


def write_adapter(folder: Path, seed: int, scale: float = 0.05) -> Path:
    """A PEFT folder with random weights, large enough to change what the model says."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(builtin_model_path() / "model.safetensors").items():
        if not name.endswith(tuple(f"{module}.weight" for module in MODULES)):
            continue
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, weight.shape[1], generator=generator) * scale
        tensors[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], RANK, generator=generator) * scale
    assert len(tensors) == 2 * LAYERS * len(MODULES)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(MODULES),
        "lora_dropout": 0.0, "bias": "none", "base_model_name_or_path": "baton-tiny",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_merged(folder: Path, adapter: Path) -> Path:
    """The model with the adapter's product added to its weights, in float32: what the adapter must be equal to."""
    shutil.copytree(builtin_model_path(), folder)
    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in weights:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in tensors:
            product = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            weights[name] += ALPHA / RANK * product
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
