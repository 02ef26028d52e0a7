"""The training command from the model card, for a few seconds: everything it writes can be loaded and trained further."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def train(out: Path, *more: str) -> str:
    brief = ["--seconds", "8", "--step-tokens", "1024", "--processes", "1", "--kept-tokens", "500000"]
    command = [sys.executable, "-m", "workers.training.train", "--out", str(out), *brief, *more]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=250).stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_few_seconds_of_training_write_a_model_that_loads(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    said = train(first)
    assert "3,967,744 parameters" in said and "trained" in said
    assert "3,967,744 parameters" in (first / "training_log.txt").read_text()

    tokenizer = AutoTokenizer.from_pretrained(first)
    model = AutoModelForCausalLM.from_pretrained(first)
    assert model.dtype == torch.bfloat16
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[1] > prompt["input_ids"].shape[1]

    train(second, "--start", str(first))
    assert (second / "tokenizer.json").read_text() == (first / "tokenizer.json").read_text()
