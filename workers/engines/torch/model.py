"""Loading a Hugging Face decoder, and refusing what the paged attention cannot serve before a request is taken."""

from __future__ import annotations

from typing import Any

import torch
import transformers
import xxhash

from pipeline.builtin import model_place
from pipeline.config import TorchSettings
from pipeline.errors import Unservable
from workers.engines.torch.attention import ATTENTION_NAME, paged_attention
from workers.engines.torch.cache import KVGeometry

SAMPLED_NUMBERS = 256  # of each weight, for the fingerprint


def load_model(name: str, settings: TorchSettings, max_model_len: int) -> Any:
    """The model in evaluation mode on its device, with the paged attention registered and set.

    `name` is a folder, a hub id or a built-in model; `max_model_len` 0 stands for what the model says. Raises `Unservable`
    naming the reason.
    """
    place = model_place(name)
    device = resolve_device(settings.device)
    transformers.utils.logging.disable_progress_bar()
    transformers.AttentionInterface.register(ATTENTION_NAME, paged_attention)
    try:
        config = transformers.AutoConfig.from_pretrained(place)
        refuse_unservable(name, config, max_model_len)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=resolve_dtype(settings.dtype, device),
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise Unservable(f"model {name}: it could not be loaded: {error}") from error
    model.eval()
    model.requires_grad_(False)
    return model.to(device)


def model_length(config: Any, max_model_len: int) -> int:
    """Longest sequence in tokens: what is asked for, at most what the model says."""
    limit: int = config.get_text_config(decoder=True).max_position_embeddings
    return min(limit, max_model_len or limit)


def geometry_of(config: Any, block_size: int, dtype: torch.dtype) -> KVGeometry:
    """Shape of the model's keys and values."""
    text = config.get_text_config(decoder=True)
    heads: int = text.num_attention_heads
    return KVGeometry(
        layers=text.num_hidden_layers,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        block_size=block_size,
        dtype=dtype,
    )


def fingerprint(model: Any, geometry: KVGeometry) -> str:
    """Equal where blocks can be exchanged: the same weights (shapes, types, a sample of each), the same order of blocks."""
    digest = xxhash.xxh3_128()
    digest.update(f"{model.config.model_type}/{geometry}/layers,kv,heads,slots,dim".encode())
    for name, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED_NUMBERS)].float().cpu().numpy()
        digest.update(f"{name}/{tuple(weight.shape)}/{weight.dtype}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()


def refuse_unservable(name: str, config: Any, max_model_len: int) -> None:
    """Raise `Unservable` for what is not a decoder with plain causal attention over all positions."""
    text = config.get_text_config(decoder=True)
    window = sliding_window(text)
    others = ", ".join(sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}))
    reasons = {
        "it is an encoder-decoder model": config.is_encoder_decoder,
        "it is not a decoder with a language model head": type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        "its attention is compressed (MLA)": getattr(text, "kv_lora_rank", None) is not None,
        f"it has layers of {others}": others,
        f"its rotary embedding is {rope_type(text)}, which depends on the length of a batch": rope_type(text)
        in ("dynamic", "longrope"),
        f"its attention slides over {window} tokens; with max_model_len = {window} it could be served": window
        is not None
        and window < model_length(config, max_model_len),
    }
    for reason, applies in reasons.items():
        if applies:
            raise Unservable(f"model {name} ({config.model_type}): {reason}; the torch engine does not serve that")


def sliding_window(config: Any) -> int | None:
    """Tokens that an attention layer looks back where that is limited."""
    layers = getattr(config, "layer_types", None)
    slides = "sliding_attention" in layers if layers else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if slides else None


def rope_type(config: Any) -> str:
    """The kind of rotary embedding, "default" where none is named."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> Any:
    """`auto` is float32 on a CPU and the model's own elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
