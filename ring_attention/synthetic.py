"""Synthetic checkpoints: a random Llama whose answers depend on every part of its cache.

At the usual init (std 0.02) noise in an eighth of the cache changed no token, so equality of tokens
proved nothing. Here the attention path is as strong as the residual, and scores are spread without
being peaked.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from .checkpoint import save_model
from .config import ModelConfig, RopeConfig

# Byte vocabulary; 8 KiB of KV per token, so 1,024 tokens are one 8 MiB extent.
DEMO: Final = ModelConfig(
    vocabulary_size=256,
    hidden_size=384,
    intermediate_size=1024,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=64,
    rope=RopeConfig(theta=500_000.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Standard deviation of what a matrix adds, for unit-variance input."""

    scores: float = 3.0
    attention: float = 0.7
    mlp: float = 1.0
    embedding: float = 1.0
    logits: float = 1.0


def write_checkpoint(directory: Path, config: ModelConfig = DEMO, seed: int = 0, scales: Scales | None = None) -> None:
    """Write a random Llama of this shape to a directory; equal seeds give equal bytes."""
    save_model(directory, llama_config(config), random_tensors(config, seed, scales or Scales()))


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config.json of a Llama of this shape (default rotary embedding only)."""
    assert config.rope.kind == "default"
    assert not config.tied_embeddings
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": False,
        "torch_dtype": config.dtype,
    }


def random_tensors(config: ModelConfig, seed: int, scales: Scales) -> dict[str, Tensor]:
    """Weights by their Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)
    hidden, dtype = config.hidden_size, getattr(torch, config.dtype)

    def matrix(rows: int, columns: int, scale: float) -> Tensor:
        normal = torch.randn(rows, columns, generator=generator)
        return (normal * (scale / sqrt(columns))).to(dtype)

    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    # A score is a sum over head_dim products, divided by sqrt(head_dim): its std is that of q times
    # that of k.
    spread = sqrt(scales.scores)
    tensors = {
        "model.embed_tokens.weight": torch.randn(config.vocabulary_size, hidden, generator=generator)
        .mul(scales.embedding)
        .to(dtype),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": matrix(config.vocabulary_size, hidden, scales.logits),
    }
    for index in range(config.layers):
        prefix = f"model.layers.{index}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": torch.ones(hidden, dtype=dtype),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden, dtype=dtype),
            f"{prefix}.self_attn.q_proj.weight": matrix(queries, hidden, spread),
            f"{prefix}.self_attn.k_proj.weight": matrix(keys, hidden, spread),
            f"{prefix}.self_attn.v_proj.weight": matrix(keys, hidden, 1.0),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, queries, scales.attention),
            f"{prefix}.mlp.gate_proj.weight": matrix(config.intermediate_size, hidden, 1.0),
            f"{prefix}.mlp.up_proj.weight": matrix(config.intermediate_size, hidden, 1.0),
            f"{prefix}.mlp.down_proj.weight": matrix(hidden, config.intermediate_size, scales.mlp),
        }
    return tensors
