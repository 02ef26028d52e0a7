"""Two ways to run a decoder over a `PagedStep` (or a `RaggedStep`): as Hugging Face wrote it, or, for the common family, with fewer
operations.

On a CPU a small model spends as much time between matrix products as in them, and products of few rows are bound by how the
weights lie in memory. `FusedDecoder` takes over the weights of models of the Llama family (one norm, joined projections, rotary
embedding, gated MLP), lays them out as the products read them and joins those that share an input. Everything else runs as
`WholeModel`. Both are compared with the model's eager attention when the engine starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import embedding, silu
from transformers.modeling_outputs import BaseModelOutputWithPast

from workers.engines.torch import onednn
from workers.engines.torch.attention import STEP_ARGUMENT, PagedStep
from workers.engines.torch.ragged import RaggedStep

PACKED_ROWS = 3  # from here on the packed weights are faster
PACKED_NBYTES = 256 * 2**20  # of a model whose weights are kept twice
LLAMA_FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class Decoder(Protocol):
    """Runs a step."""

    def hidden(self, step: PagedStep | RaggedStep) -> torch.Tensor:
        """[total, hidden size], behind the last norm; what the model would make logits of."""
        ...

    def logits(self, step: PagedStep) -> torch.Tensor:
        """[rows that sample, vocabulary], of the last position of each; the step's keys and values are written."""
        ...

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary]: the logits that the model would make of rows of `hidden`."""
        ...


def decoder_of(model: Any, max_model_len: int) -> Decoder:
    """The fastest way to run this model. The weights that a `FusedDecoder` takes over are gone from the model."""
    is_known = type(model).__name__ in LLAMA_FAMILY and model.config.hidden_act in ("silu", "swish")
    return FusedDecoder(model, max_model_len) if is_known else WholeModel(model)


class WholeModel:
    """The model as it is; its attention function finds the step among the keyword arguments."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def hidden(self, step: PagedStep | RaggedStep) -> torch.Tensor:
        """See `Decoder.hidden`."""
        arguments = {STEP_ARGUMENT: step}
        output = self._model.base_model(
            input_ids=step.input_ids, position_ids=step.position_ids, use_cache=False, **arguments
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, step: PagedStep) -> torch.Tensor:
        """See `Decoder.logits`."""
        output = self._model(
            input_ids=step.input_ids,
            position_ids=step.position_ids,
            use_cache=False,
            logits_to_keep=step.sampling,
            **{STEP_ARGUMENT: step},
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Decoder.head`. The model's own way: there are some that scale or cap their logits."""
        inner = self._model.base_model
        inner.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=rows[None])
        try:
            logits: torch.Tensor = self._model(
                input_ids=torch.zeros_like(rows[None, :, 0], dtype=torch.long), use_cache=False
            ).logits[0]
        finally:
            del inner.forward  # the class's is there again
        return logits


class Product:
    """x @ weight + bias, for one or several linear layers side by side.

    `weight` [in, out] is contiguous, so that a product of one or two rows reads it in order. On a CPU a small model also
    keeps it as oneDNN packs it, which is faster for more rows; packing in each call is what costs there.
    """

    def __init__(self, *linears: Any, packed: bool) -> None:
        together = torch.cat([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears]
        self._bias = None if biases[0] is None else torch.cat(biases)
        self._packed = onednn.packed(together) if packed else None
        self._weight = together.t().contiguous()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if self._packed is not None and rows.shape[0] >= PACKED_ROWS:
            return onednn.product(rows, self._packed, self._bias)
        if self._bias is None:
            return torch.mm(rows, self._weight)
        return torch.addmm(self._bias, rows, self._weight)

    def added_to(self, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """residual + x @ weight + bias."""
        if self._packed is not None and rows.shape[0] >= PACKED_ROWS:
            return residual + self(rows)
        added = torch.addmm(residual, rows, self._weight)
        return added if self._bias is None else added + self._bias


def can_pack(model: Any) -> bool:
    """Whether a second, packed copy of the weights is worth its memory and this PyTorch can make it."""
    nbytes = sum(weight.nbytes for weight in model.parameters())
    return nbytes <= PACKED_NBYTES and onednn.is_usable(model.device, model.dtype)


@dataclass(slots=True)
class Norm:
    """Root mean square norm over the last dimension."""

    weight: torch.Tensor
    epsilon: torch.Tensor  # float32, no dimensions

    @classmethod
    def of(cls, norm: Any) -> Norm:
        """The same norm as this layer."""
        return cls(norm.weight, torch.tensor(norm.variance_epsilon, device=norm.weight.device))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.epsilon, length, length, value=1 / rows.shape[-1]).rsqrt_()
        return self.weight * (rows * scale).to(rows.dtype)


class FusedDecoder:
    """Models of the Llama family: [total, hidden] through all layers, one ragged row."""

    def __init__(self, model: Any, max_model_len: int) -> None:
        inner, packed = model.model, can_pack(model)
        first = inner.layers[0].self_attn
        self._head_dim: int = first.head_dim
        self._scaling: float = first.scaling
        self._embedding: torch.Tensor = inner.embed_tokens.weight
        positions = torch.arange(max_model_len, device=model.device)[None]
        cos, sin = inner.rotary_emb(self._embedding, positions)
        self._cos, self._sin = cos[0, :, None], signed(sin[0, :, None])
        self._layers: list[FusedLayer] = []
        for index in range(len(inner.layers)):
            self._layers.append(FusedLayer(inner.layers[index], packed))
            inner.layers[index] = torch.nn.Identity()  # its weights are copied: free them layer by layer
        self._norm = Norm.of(inner.norm)
        self._head = Product(model.lm_head, packed=True) if packed else model.lm_head

    def hidden(self, step: PagedStep | RaggedStep) -> torch.Tensor:
        """See `Decoder.hidden`."""
        return self._through_layers(step, None)

    def logits(self, step: PagedStep) -> torch.Tensor:
        """See `Decoder.logits`."""
        return self.head(self._through_layers(step, step.sampling))

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Decoder.head`."""
        logits: torch.Tensor = self._head(rows)
        return logits

    def _through_layers(self, step: PagedStep | RaggedStep, wanted: torch.Tensor | None) -> torch.Tensor:
        """[total, hidden], or of the rows `wanted` alone, behind the last norm."""
        hidden = embedding(step.input_ids[0], self._embedding)
        cos, sin = self._cos[step.position_ids[0]], self._sin[step.position_ids[0]]
        for index, layer in enumerate(self._layers):
            kept = wanted if index == len(self._layers) - 1 else None
            hidden = layer.forward(hidden, cos, sin, index, step, self._scaling, self._head_dim, kept)
        return self._norm(hidden)


class FusedLayer:
    """One layer's weights, joined where they share an input."""

    def __init__(self, layer: Any, packed: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._attention_norm = Norm.of(layer.input_layernorm)
        self._qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj, packed=packed)
        self._output = Product(attention.o_proj, packed=packed)
        self._mlp_norm = Norm.of(layer.post_attention_layernorm)
        self._gate_up = Product(mlp.gate_proj, mlp.up_proj, packed=packed)
        self._down = Product(mlp.down_proj, packed=packed)
        self._groups: int = attention.num_key_value_groups
        self._query_norm = Norm.of(attention.q_norm) if hasattr(attention, "q_norm") else None
        self._key_norm = Norm.of(attention.k_norm) if hasattr(attention, "k_norm") else None

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        index: int,
        step: PagedStep | RaggedStep,
        scaling: float,
        head_dim: int,
        kept: torch.Tensor | None,
    ) -> torch.Tensor:
        """[total, hidden] -> [total, hidden], or of the rows `kept` alone: behind the last attention no other is used."""
        total = hidden.shape[0]
        heads = self._qkv(self._attention_norm(hidden)).view(total, -1, head_dim)
        kv_heads = heads.shape[1] // (self._groups + 2)
        queries_keys, values = heads[:, :-kv_heads], heads[:, -kv_heads:]
        if self._query_norm is not None and self._key_norm is not None:
            queries, keys = queries_keys[:, :-kv_heads], queries_keys[:, -kv_heads:]
            queries_keys = torch.cat((self._query_norm(queries), self._key_norm(keys)), dim=1)
        rotated = rotate(queries_keys, cos, sin).transpose(0, 1)[None]
        attended = step.attend(
            index, rotated[:, :-kv_heads], rotated[:, -kv_heads:], values.transpose(0, 1)[None], scaling
        )
        attended = attended.reshape(total, -1)
        if kept is not None:
            hidden, attended = hidden[kept], attended[kept]
        hidden = self._output.added_to(hidden, attended)
        gate, up = self._gate_up(self._mlp_norm(hidden)).chunk(2, dim=-1)
        return self._down.added_to(hidden, silu(gate, inplace=True).mul_(up))


def signed(sin: torch.Tensor) -> torch.Tensor:
    """`sin` with the sign of `rotate_half` in it."""
    half = sin.shape[-1] // 2
    return torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)


def rotate(heads: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [total, heads, dim]: the halves of a head are the two coordinates."""
    first, second = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * cos, torch.cat((second, first), dim=-1), signed_sin)
