"""Decoder: the forward pass of Llama, Mistral, Qwen2 and Qwen3, written once for any attention.

Shapes: T tokens, H query heads, Hkv kv heads, D head dim, E hidden size, V vocabulary size, L
layers. Under tensor parallelism H and Hkv are this rank's share of the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..kvstore.errors import TokenOutOfRange
from ..kvstore.spec import KVSpec
from .config import ModelConfig
from .rope import frequencies, rotate, rotation
from .weight_share import WeightShare, share_of
from .weights import Linear, Range, Sliced, Weights

# (layer, query [H, T, D], key [Hkv, T, D], value [Hkv, T, D]) -> [H, T, D]
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Reduce = Callable[[Tensor], None]  # sums a tensor in place over the tensor-parallel ranks


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


def _read_layer(weights: Weights, index: int, config: ModelConfig, share: WeightShare) -> _Layer:
    prefix = f"model.layers.{index}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    width, dim, columns = config.hidden_size, config.head_dim, config.intermediate_size
    queries = _times(share.queries, dim)
    keys = (config.kv_heads * dim, _times(share.keys, dim))
    projections = {
        f"{attention}.q_proj": (config.heads * dim, queries),
        f"{attention}.k_proj": keys,
        f"{attention}.v_proj": keys,
    }
    gate_up = dict.fromkeys((f"{mlp}.gate_proj", f"{mlp}.up_proj"), (columns, share.intermediate))
    normalised = config.normalises_heads
    return _Layer(
        input_norm=weights.vector(f"{prefix}.input_layernorm.weight", width),
        query_key_value=weights.joined(projections, width),
        query_norm=weights.vector(f"{attention}.q_norm.weight", dim) if normalised else None,
        key_norm=weights.vector(f"{attention}.k_norm.weight", dim) if normalised else None,
        output=weights.summed(f"{attention}.o_proj", (width, config.heads * dim), queries),
        post_norm=weights.vector(f"{prefix}.post_attention_layernorm.weight", width),
        gate_up=weights.joined(gate_up, width),
        down=weights.summed(f"{mlp}.down_proj", (width, columns), share.intermediate),
    )


def _times(part: Range, size: int) -> Range:
    return part[0] * size, part[1] * size


class Decoder:
    """A decoder-only transformer in evaluation, or one tensor-parallel rank's part of it."""

    def __init__(
        self, config: ModelConfig, spec: KVSpec, tensors: Mapping[str, Sliced], tp: int = 1, tp_rank: int = 0
    ) -> None:
        """`tensors` whole, by their Hugging Face names, on one device; what is kept is the rank's part.

        Raises InvalidSpec for missing or unknown ones, and for a `tp` that does not divide the model.
        """
        weights = Weights(tensors)
        self.config = config
        self.spec = spec
        self.tp = tp
        self.share = share_of(config, tp, tp_rank)
        whole = (config.vocabulary_size, config.hidden_size)
        self._embedding = weights.rows("model.embed_tokens.weight", whole, (0, whole[0]))
        self._layers = [_read_layer(weights, index, config, self.share) for index in range(config.layers)]
        self._norm = weights.vector("model.norm.weight", config.hidden_size)
        if config.tied_embeddings:
            weights.has("lm_head.weight")  # some checkpoints keep the copy
            self._head = self._embedding
        else:
            self._head = weights.rows("lm_head.weight", whole, (0, whole[0]))
        weights.check_all_known()
        self._inverse = frequencies(config.rope, config.head_dim).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.device

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises TokenOutOfRange for an id outside the vocabulary."""
        if tokens and (min(tokens) < 0 or max(tokens) >= self.config.vocabulary_size):
            raise TokenOutOfRange(f"token ids must lie in [0, {self.config.vocabulary_size})")

    def hidden(self, tokens: Tensor, positions: Tensor, attention: Attention, reduce: Reduce) -> Tensor:
        """Final hidden states [T, E] of token ids [T] at global positions [T]; T may be 0.

        `attention` gets this rank's heads. `reduce` gets contiguous [T, E] in the model's dtype, twice a layer; it must
        leave the same bits on all tp ranks, which then go on with equal states.
        """
        cos, sin = rotation(positions, self._inverse, self._embedding.dtype)
        states = functional.embedding(tokens, self._embedding)
        for index, layer in enumerate(self._layers):
            normed = self._rms(states, layer.input_norm)
            heads = self._attend(index, layer, normed, cos, sin, attention)
            states = states + _summed(heads, layer.output, reduce)
            normed = self._rms(states, layer.post_norm)
            gate, up = functional.linear(normed, *layer.gate_up).chunk(2, dim=-1)
            states = states + _summed(functional.silu(gate) * up, layer.down, reduce)
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
        """This rank's heads side by side: [T, H D]."""
        tokens, dim = states.shape[0], self.config.head_dim
        sizes = [self.share.heads, self.share.kv_heads, self.share.kv_heads]
        joined = functional.linear(states, *layer.query_key_value).view(tokens, sum(sizes), dim)
        query, key, value = torch.split(joined.transpose(0, 1), sizes)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = self._rms(query, layer.query_norm), self._rms(key, layer.key_norm)
        out = attention(index, rotate(query, cos, sin), rotate(key, cos, sin), value)
        return out.to(states.dtype).transpose(0, 1).reshape(tokens, self.share.heads * dim)

    def _rms(self, states: Tensor, weight: Tensor) -> Tensor:
        wide = states.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.norm_eps)
        return weight * scaled.to(states.dtype)

    @torch.inference_mode()
    def dense_logits(self, tokens: Sequence[int], last: int) -> Tensor:
        """Float32 [last, V] for the last positions of `tokens`: dense, without cache, ring or merge. The oracle."""
        assert 1 <= last <= len(tokens), (last, len(tokens))
        assert self.tp == 1, "the oracle is a whole model"
        self.check_tokens(tokens)
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
        positions = torch.arange(len(tokens), device=self.device)
        return self.logits(self.hidden(ids, positions, self._dense_attention, alone)[-last:])

    def _dense_attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of queries and keys at positions 0, 1, ...: a plain mask, made apart from the ring's."""
        window, mask = self.config.windows[layer], None
        if window is not None:
            at = torch.arange(query.shape[1], device=self.device)
            behind = at[:, None] - at  # how far the key lies behind the query
            mask = (behind >= 0) & (behind < window)
        return functional.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=query.shape[0] != key.shape[0],
        )[0]


def alone(_partial: Tensor) -> None:
    """The `reduce` of a whole model: there is nothing to add."""


def _summed(states: Tensor, projection: Linear, reduce: Reduce) -> Tensor:
    """A projection of which each rank has some input columns. The bias is added once, after the sum."""
    weight, bias = projection
    partial = functional.linear(states, weight)
    reduce(partial)
    return partial if bias is None else partial + bias
