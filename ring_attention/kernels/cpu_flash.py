"""Torch's CPU flash attention: the one operator that gives a log-sum-exp there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..band import FULL, Band
from .kernel import Capabilities, Corner, Kernel, nothing_lacks


def _call(query: Tensor, key: Tensor, value: Tensor, sees: Band | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    mask = sees if isinstance(sees, Tensor) else None
    causal = mask is None and sees != FULL
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], key[None], value[None], 0.0, causal, attn_mask=mask, scale=scale
    )
    return out[0], lse[0]


CPU_FLASH = Kernel(
    name="cpu_flash",
    capabilities=Capabilities(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64}),
        gqa=True,
        causal_corner=Corner.TOP_LEFT,
        masks=True,
    ),
    call=_call,
    obstacle=nothing_lacks,
)
