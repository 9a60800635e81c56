"""The flash-attn packages, if one is installed: FlashAttention 4 (flash-attn-4), else 2. Not yet run here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...kvstore.errors import ConfigError, HoldfastError, MissingExtra
from ..band import Band
from .kernel import Capabilities, Corner, Kernel, window_of

# (query, key, value [1, tokens, heads, D], scale, band, tokens, rows) -> (out, lse [1, H, T])
_Flash = Callable[[Tensor, Tensor, Tensor, float, Band], tuple[Tensor, Tensor]]


@cache
def _flash() -> _Flash:
    """The installed package's function. Raises MissingExtra."""
    try:
        from flash_attn.cute import flash_attn_func as fourth
    except ImportError:
        pass
    else:
        return _fourth(fourth)
    try:
        from flash_attn import flash_attn_func as second
    except ImportError:
        raise MissingExtra(
            "the kernel flash_attn needs a package of its own: pip install --pre flash-attn-4, or flash-attn"
        ) from None
    return _second(second)


def _fourth(function: Callable[..., Any]) -> _Flash:
    def call(query: Tensor, key: Tensor, value: Tensor, scale: float, band: Band) -> tuple[Tensor, Tensor]:
        window = window_of(band, query.shape[1], key.shape[1], None)
        out, lse = function(query, key, value, softmax_scale=scale, window_size=window, return_lse=True)
        return out, lse

    return call


def _second(function: Callable[..., Any]) -> _Flash:
    def call(query: Tensor, key: Tensor, value: Tensor, scale: float, band: Band) -> tuple[Tensor, Tensor]:
        window = window_of(band, query.shape[1], key.shape[1], -1)
        out, lse, _ = function(query, key, value, softmax_scale=scale, window_size=window, return_attn_probs=True)
        return out, lse

    return call


def _call(query: Tensor, key: Tensor, value: Tensor, sees: Band | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    assert not isinstance(sees, Tensor), "masks are not declared"
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    out, lse = _flash()(q, k, v, scale, sees)
    return out[0].transpose(0, 1), lse[0]


def _obstacle() -> HoldfastError | None:
    try:
        _flash()
    except MissingExtra as error:
        return error
    return None if torch.cuda.is_available() else ConfigError("flash_attn needs a GPU, and torch sees none")


FLASH_ATTN = Kernel(
    name="flash_attn",
    capabilities=Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        gqa=True,
        causal_corner=Corner.BOTTOM_RIGHT,
        window=True,
        varlen=True,
        head_dim_max=256,
        head_dim_multiple=8,
    ),
    call=_call,
    obstacle=_obstacle,
)
