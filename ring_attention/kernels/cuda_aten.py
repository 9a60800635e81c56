"""Torch's built-in CUDA operators: FlashAttention for half precision, the memory-efficient kernel for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kvstore.errors import ConfigError, HoldfastError
from ..band import FULL, Band
from .kernel import Capabilities, Corner, Kernel

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_DIM_MAX = 256


def _call(query: Tensor, key: Tensor, value: Tensor, sees: Band | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    assert not isinstance(sees, Tensor), "masks are not declared"
    causal = sees != FULL
    q, k, v = query[None], key[None], value[None]
    if query.dtype in _FLASH_DTYPES and query.shape[2] <= _FLASH_DIM_MAX:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
    return out[0], lse[0, :, : query.shape[1]]  # the efficient kernel pads lse rows to a multiple of 32


def _obstacle() -> HoldfastError | None:
    return None if torch.cuda.is_available() else ConfigError("cuda_aten needs a GPU, and torch sees none")


CUDA_ATEN = Kernel(
    name="cuda_aten",
    capabilities=Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        gqa=False,
        causal_corner=Corner.SQUARES_ONLY,  # the two operators do not agree on a corner
        head_dim_multiple=8,
    ),
    call=_call,
    obstacle=_obstacle,
)
