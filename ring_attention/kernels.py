"""Attention kernels, each giving (out, natural-log lse), chosen by device or by name.

Shapes: H query heads, Hkv kv heads (H a multiple of Hkv), T query tokens, S key tokens, D key dim,
Dv value dim. `attend` is the boundary: what a kernel is unable to take (no rows, wrong corner)
never reaches one.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from math import inf, sqrt
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from ..kvstore.errors import ConfigError
from .merge import Partial, identity

# Below this many queries a GQA group's heads are read as more queries of one head: each key is then
# read once per group (3-9x faster decode on CPU).
FOLD_BELOW_TOKENS: Final = 64


class Mask(Enum):
    """Which keys a query sees: all, or (as many keys as queries) those up to its own index.

    There is no other mask: kernels disagree on which corner a non-square causal mask is aligned to.
    """

    FULL = "full"
    DIAGONAL = "diagonal"


Kernel = Callable[[Tensor, Tensor, Tensor, Mask], tuple[Tensor, Tensor]]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, kernel: str | None = None) -> Partial:
    """Attention of query [H, T, D] over key [Hkv, S, D] and value [Hkv, S, Dv], scaled by 1/sqrt(D).

    Raises ConfigError for an unknown kernel name.
    """
    heads, tokens, _ = query.shape
    rows, value_dim = value.shape[1:]
    assert heads % key.shape[0] == 0, "query heads are a multiple of kv heads"
    assert mask is Mask.FULL or tokens == rows, "a diagonal call is square"
    if not tokens or not rows:  # an empty operand kills the process inside the CPU kernel
        return identity(heads, tokens, value_dim, query.device)
    out, lse = _named(kernel or default_kernel(query.device))(query, key, value, mask)
    return Partial(out.to(torch.float32), lse.to(torch.float32))


def default_kernel(device: torch.device) -> str:
    """Name of the kernel for a device."""
    return "cuda_aten" if device.type == "cuda" else "cpu_flash"


def _named(name: str) -> Kernel:
    if name not in KERNELS:
        raise ConfigError(f"unknown attention kernel {name!r}; use one of {', '.join(sorted(KERNELS))}")
    return KERNELS[name]


def _folded(call: Kernel, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A FULL call with each GQA group's heads laid out as further queries of its kv head."""
    heads, tokens, dim = query.shape
    packed = query.reshape(key.shape[0], -1, dim)
    out, lse = call(packed, key, value, Mask.FULL)
    return out.reshape(heads, tokens, value.shape[2]), lse.reshape(heads, tokens)


def _cpu_flash_call(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], key[None], value[None], 0.0, mask is Mask.DIAGONAL
    )
    return out[0], lse[0]


def cpu_flash(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Torch's CPU flash attention: GQA native, f32/bf16/f16/f64, lse natural log."""
    dim, value_dim = query.shape[2], value.shape[2]
    if value_dim != dim:  # the op takes one dim: pad with zeros, which change neither scores nor kept columns
        width = max(dim, value_dim)
        query = functional.pad(query, (0, width - dim)) * sqrt(width / dim)
        key, value = (
            functional.pad(key, (0, width - dim)),
            functional.pad(value, (0, width - value_dim)),
        )
    if mask is Mask.FULL and query.shape[1] < FOLD_BELOW_TOKENS:
        out, lse = _folded(_cpu_flash_call, query, key, value)
    else:
        out, lse = _cpu_flash_call(query, key, value, mask)
    return out[..., :value_dim], lse


def _cuda_call(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    causal = mask is Mask.DIAGONAL
    q, k, v = query[None], key[None], value[None]
    if query.dtype in (torch.float16, torch.bfloat16) and query.shape[2] == value.shape[2]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    else:  # FlashAttention takes half precision only
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    return out[0], lse[0, :, : query.shape[1]]  # the efficient kernel pads lse rows to a multiple of 32


def cuda_aten(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Torch's built-in CUDA kernels, which want as many kv heads as query heads. Not yet run on a GPU."""
    if mask is Mask.FULL:
        return _folded(_cuda_call, query, key, value)
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    return _cuda_call(query, key, value, mask)


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Dense softmax attention in float64, for tests."""
    group = query.shape[0] // key.shape[0]
    keys, values = (
        key.double().repeat_interleave(group, 0),
        value.double().repeat_interleave(group, 0),
    )
    scores = query.double() @ keys.transpose(1, 2) / sqrt(query.shape[2])
    if mask is Mask.DIAGONAL:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -inf)
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


KERNELS: Final[dict[str, Kernel]] = {
    "cpu_flash": cpu_flash,
    "cuda_aten": cuda_aten,
    "reference": reference,
}
