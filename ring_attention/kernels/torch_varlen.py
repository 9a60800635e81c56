"""Torch's `varlen_attn`: FlashAttention with bands and fewer kv heads than query heads, on a GPU. Not yet run on one.

Torch 2.13's signature is used as far as the installed torch has it.
"""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import varlen

from ...kvstore.errors import ConfigError, HoldfastError
from ..band import Band
from .kernel import Capabilities, Corner, Kernel, window_of

_PARAMETERS: Final = frozenset(signature(varlen.varlen_attn).parameters)
_NEEDED: Final = frozenset({"return_aux", "scale", "window_size"})
_GQA: Final = "enable_gqa" in _PARAMETERS


def _call(query: Tensor, key: Tensor, value: Tensor, sees: Band | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    assert not isinstance(sees, Tensor), "masks are not declared"
    tokens, rows = query.shape[1], key.shape[1]
    options: dict[str, Any] = {"enable_gqa": True} if _GQA else {}
    out, lse = varlen.varlen_attn(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        _ends(tokens, query.device),
        _ends(rows, query.device),
        tokens,
        rows,
        return_aux=varlen.AuxRequest(lse=True),
        scale=scale,
        window_size=window_of(sees, tokens, rows, -1),
        **options,
    )
    return out.transpose(0, 1), lse


@lru_cache(maxsize=256)
def _ends(tokens: int, device: torch.device) -> Tensor:
    """Where one sequence begins and ends; kept, because bringing it to the device waits for that."""
    return torch.tensor([0, tokens], dtype=torch.int32, device=device)


def _obstacle() -> HoldfastError | None:
    if not _NEEDED <= _PARAMETERS:
        lacks = ", ".join(sorted(_NEEDED - _PARAMETERS))
        return ConfigError(f"torch_varlen needs a newer torch: varlen_attn of {torch.__version__} lacks {lacks}")
    if not torch.cuda.is_available():
        return ConfigError("torch_varlen needs a GPU, and torch sees none")
    return None


TORCH_VARLEN = Kernel(
    name="torch_varlen",
    capabilities=Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        gqa=_GQA,
        causal_corner=Corner.BOTTOM_RIGHT,
        window=True,
        varlen=True,
        head_dim_max=256,
        head_dim_multiple=8,
    ),
    call=_call,
    obstacle=_obstacle,
)
