"""Decoder: the forward pass of Llama, Mistral, Qwen2 and Qwen3, written once for any attention.

Shapes: T tokens, H query heads, Hkv kv heads, D head dim, E hidden size, V vocabulary size, L
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..kvstore.errors import InvalidSpec, TokenOutOfRange
from ..kvstore.spec import KVSpec
from .config import ModelConfig
from .rope import frequencies, rotate, rotation

# (layer, query [H, T, D], key [Hkv, T, D], value [Hkv, T, D]) -> [H, T, D]
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class _Weights:
    """Named tensors, each taken once, so that what a checkpoint has and we ignore is noticed."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._taken: set[str] = set()

    def maybe(self, name: str) -> Tensor | None:
        self._taken.add(name)
        return self._tensors.get(name)

    def take(self, name: str) -> Tensor:
        found = self.maybe(name)
        if found is None:
            raise InvalidSpec(f"the checkpoint lacks the tensor {name!r}")
        return found

    def linear(self, *names: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of projections that read the same input, joined into one."""
        weights = [self.take(f"{name}.weight") for name in names]
        biases = [self.maybe(f"{name}.bias") for name in names]
        if all(bias is None for bias in biases):
            return torch.cat(weights), None
        filled = [
            weight.new_zeros(weight.shape[0]) if bias is None else bias
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return torch.cat(weights), torch.cat(filled)

    def check_all_taken(self) -> None:
        left = {name for name in self._tensors if not name.endswith("rotary_emb.inv_freq")} - self._taken
        if left:
            raise InvalidSpec(f"the checkpoint has tensors that are not supported: {', '.join(sorted(left)[:5])}")


Linear = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer."""

    input_norm: Tensor
    query_key_value: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


def _read_layer(weights: _Weights, index: int, config: ModelConfig) -> _Layer:
    prefix = f"model.layers.{index}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    normalised = config.normalises_heads
    return _Layer(
        input_norm=weights.take(f"{prefix}.input_layernorm.weight"),
        query_key_value=weights.linear(*(f"{attention}.{part}_proj" for part in "qkv")),
        query_norm=weights.take(f"{attention}.q_norm.weight") if normalised else None,
        key_norm=weights.take(f"{attention}.k_norm.weight") if normalised else None,
        output=weights.linear(f"{attention}.o_proj"),
        post_norm=weights.take(f"{prefix}.post_attention_layernorm.weight"),
        gate_up=weights.linear(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        down=weights.linear(f"{mlp}.down_proj"),
    )


class Decoder:
    """A decoder-only transformer in evaluation."""

    def __init__(self, config: ModelConfig, spec: KVSpec, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` by their Hugging Face names, on one device. Raises InvalidSpec for missing or unknown ones."""
        weights = _Weights(tensors)
        self.config = config
        self.spec = spec
        self._embedding = weights.take("model.embed_tokens.weight")
        self._layers = [_read_layer(weights, index, config) for index in range(config.layers)]
        self._norm = weights.take("model.norm.weight")
        head = weights.maybe("lm_head.weight")
        if config.tied_embeddings or head is None:
            if not config.tied_embeddings:
                raise InvalidSpec("the checkpoint lacks lm_head.weight and does not tie embeddings")
            head = self._embedding
        self._head = head
        weights.check_all_taken()
        self._inverse = frequencies(config.rope, config.head_dim).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.device

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises TokenOutOfRange for an id outside the vocabulary."""
        if tokens and (min(tokens) < 0 or max(tokens) >= self.config.vocabulary_size):
            raise TokenOutOfRange(f"token ids must lie in [0, {self.config.vocabulary_size})")

    def hidden(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Final hidden states [T, E] of token ids [T] at global positions [T]; T may be 0."""
        cos, sin = rotation(positions, self._inverse, self._embedding.dtype)
        states = functional.embedding(tokens, self._embedding)
        for index, layer in enumerate(self._layers):
            normed = self._rms(states, layer.input_norm)
            states = states + self._attend(index, layer, normed, cos, sin, attention)
            normed = self._rms(states, layer.post_norm)
            gate, up = functional.linear(normed, *layer.gate_up).chunk(2, dim=-1)
            states = states + functional.linear(functional.silu(gate) * up, *layer.down)
        return self._rms(states, self._norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 [T, V] of hidden states [T, E]."""
        return functional.linear(hidden, self._head).float()

    def _attend(
        self,
        index: int,
        layer: _Layer,
        states: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
    ) -> Tensor:
        config = self.config
        tokens = states.shape[0]
        total = config.heads + 2 * config.kv_heads
        joined = functional.linear(states, *layer.query_key_value).view(tokens, total, config.head_dim)
        heads = joined.transpose(0, 1)
        query, rest = heads[: config.heads], heads[config.heads :]
        key, value = rest[: config.kv_heads], rest[config.kv_heads :]
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = self._rms(query, layer.query_norm), self._rms(key, layer.key_norm)
        out = attention(index, rotate(query, cos, sin), rotate(key, cos, sin), value)
        flat = out.to(states.dtype).transpose(0, 1).reshape(tokens, config.heads * config.head_dim)
        return functional.linear(flat, *layer.output)

    def _rms(self, states: Tensor, weight: Tensor) -> Tensor:
        wide = states.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.norm_eps)
        return weight * scaled.to(states.dtype)

    @torch.inference_mode()
    def dense_logits(self, tokens: Sequence[int], last: int) -> Tensor:
        """Float32 [last, V] for the last positions of `tokens`: dense, without cache, ring or merge. The oracle."""
        assert 1 <= last <= len(tokens), (last, len(tokens))
        self.check_tokens(tokens)
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
        positions = torch.arange(len(tokens), device=self.device)
        return self.logits(self.hidden(ids, positions, _dense_attention)[-last:])


def _dense_attention(_layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        is_causal=True,
        enable_gqa=query.shape[0] != key.shape[0],
    )[0]
