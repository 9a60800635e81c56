"""Synthetic checkpoints: random models whose answers depend on every part of their cache.

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
from .config import FULL, SLIDING, ModelConfig, RopeConfig

TIED_EMBEDDING: Final = 0.1
BIAS: Final = 0.2  # shows when one is forgotten, and leaves the scores to the text

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
    """Write a random model of this shape, architecture, windows and dtype; equal seeds give equal bytes.

    What lies outside every layer's window changes no answer, as in any such model.
    """
    save_model(directory, raw_config(config), random_tensors(config, seed, scales or Scales()))


def raw_config(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config.json of a model of this shape; `config.parse_config` reads it back."""
    assert config.has_layer_types or len(set(config.windows)) == 1, "this architecture has one window for all layers"
    raw: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
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
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": config.dtype,
    }
    if config.rope.kind != "default":
        raw["rope_scaling"] = {
            "rope_type": config.rope.kind,
            "factor": config.rope.factor,
            "low_freq_factor": config.rope.low_freq_factor,
            "high_freq_factor": config.rope.high_freq_factor,
            "original_max_position_embeddings": config.rope.original_positions,
        }
    if config.architecture != "LlamaForCausalLM":
        raw["sliding_window"] = config.window
    if config.has_layer_types:
        raw["use_sliding_window"] = config.window is not None
        raw["layer_types"] = [FULL if window is None else SLIDING for window in config.windows]
    if config.eos:
        raw["eos_token_id"] = list(config.eos)
    return raw


def random_tensors(config: ModelConfig, seed: int, scales: Scales) -> dict[str, Tensor]:
    """Weights by their Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)
    hidden, dtype = config.hidden_size, getattr(torch, config.dtype)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale).to(dtype)

    def matrix(rows: int, columns: int, scale: float) -> Tensor:
        return normal(rows, columns, scale=scale / sqrt(columns))

    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    # A score is a sum over head_dim products, divided by sqrt(head_dim): its std is that of q times
    # that of k.
    spread = sqrt(scales.scores)
    # A tied head would prefer the token it has just read, were the embedding still strong at the end.
    embedding = scales.embedding * (TIED_EMBEDDING if config.tied_embeddings else 1.0)
    tensors = {
        "model.embed_tokens.weight": normal(config.vocabulary_size, hidden, scale=embedding),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
    }
    if not config.tied_embeddings:
        tensors["lm_head.weight"] = matrix(config.vocabulary_size, hidden, scales.logits)
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
        if config.architecture == "Qwen2ForCausalLM":
            tensors |= {
                f"{prefix}.self_attn.{part}_proj.bias": normal(rows, scale=BIAS)
                for part, rows in (("q", queries), ("k", keys), ("v", keys))
            }
        if config.normalises_heads:  # which makes the scores' std 1 before these
            weight = torch.full((config.head_dim,), spread, dtype=dtype)
            tensors |= {f"{prefix}.self_attn.{part}_norm.weight": weight.clone() for part in "qk"}
    return tensors
