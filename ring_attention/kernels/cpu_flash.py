"""Torch's CPU flash attention: the one operator that gives a log-sum-exp there."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ..band import FULL, Band
from ..merge import Accumulator, Partial
from .kernel import Capabilities, Corner, Kernel, nothing_lacks

# The operator reads all keys once for every 64 query rows (32 below 192 rows, 256 from 768 on). Keys in
# pieces that stay in the cache meanwhile make float32 a seventh faster at 640 rows over 16K keys; half
# precision, which computes longer for each byte read, gains nothing.
FEW_ROWS: Final = range(128, 768)
KEYS_AT_ONCE: Final = 2048


def _call(query: Tensor, key: Tensor, value: Tensor, sees: Band | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    heads, rows, _ = query.shape
    rereads = query.dtype == torch.float32 and rows in FEW_ROWS and key.shape[1] > KEYS_AT_ONCE
    if not rereads or sees is not FULL:
        return _operator(query, key, value, sees, scale)
    total = Accumulator(heads, rows, value.shape[2], query.device)
    for keys, values in zip(torch.split(key, KEYS_AT_ONCE, 1), torch.split(value, KEYS_AT_ONCE, 1), strict=True):
        total.add(Partial(*_operator(query, keys, values, FULL, scale)), 0)
    whole = total.result()
    return whole.out, whole.lse


def _operator(query: Tensor, key: Tensor, value: Tensor, sees: Band | Tensor, scale: float) -> tuple[Tensor, Tensor]:
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
