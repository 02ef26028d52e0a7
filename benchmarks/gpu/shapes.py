"""Models without weights: a folder with nothing but a `config.json`, which vLLM fills with dummy weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A Llama of some size."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    dtype: str

    def kv_nbytes(self, tokens: int) -> int:
        """Keys and values of so many tokens."""
        return tokens * self.layers * 2 * self.kv_heads * self.head_dim * (4 if self.dtype == "float32" else 2)

    def write(self, folder: Path) -> Path:
        """The model's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "torch_dtype": self.dtype,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        return folder


SHAPES = {
    "8b": Shape(4096, 32, 32, 8, 128, 14336, 128256, 16384, "bfloat16"),
    "tiny": Shape(256, 4, 4, 2, 64, 704, 4096, 4096, "float32"),
}
