"""The model that comes with Baton: a few megabytes of weights, a tokenizer and a model card in `models/baton-tiny`."""

from __future__ import annotations

from pathlib import Path

BUILTIN_MODEL = "baton-tiny"


def builtin_model_path() -> Path:
    """The folder that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    return Path(__file__).parent / "models" / BUILTIN_MODEL


def model_place(name: str) -> str:
    """What a library loads for the model of a pool: the folder of the built-in one, else the name (a folder or a hub id)."""
    return str(builtin_model_path()) if name == BUILTIN_MODEL else name
