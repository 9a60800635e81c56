"""Rotary position embedding (arXiv 2104.09864), in the half-split form of Hugging Face checkpoints.

Shapes: T tokens, D head dim.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from .config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dims: float32 [D/2]."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (config.theta**steps)
    if config.kind == "default":
        return plain
    if config.kind == "linear":
        return plain / config.factor
    # Llama 3: long wavelengths are stretched, short ones kept, those between blended.
    wavelength = 2 * pi / plain
    turns = config.original_positions / wavelength
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    keep = blend.clamp(0.0, 1.0)
    return (1 - keep) * plain / config.factor + keep * plain


def rotation(positions: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [T, D], of global positions [T]."""
    angles = positions.float().unsqueeze(-1) * inverse
    doubled = torch.cat([angles, angles], dim=-1)
    return doubled.cos().to(dtype), doubled.sin().to(dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate states [heads, T, D] to their positions."""
    low, high = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-high, low], dim=-1) * sin
