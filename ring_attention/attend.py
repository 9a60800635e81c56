"""Attend: the one boundary between attention and kernels. Whatever the kernel, the result is the same.

Natural-log float32 lse, -inf for rows that see nothing, empty operands, any band, fewer kv heads
than query heads, values of another dim than keys. Shapes: H query heads, Hkv kv heads (H a multiple
of Hkv), T query tokens, S key tokens, D key dim, Dv value dim.
"""

from __future__ import annotations

from math import e, inf, log, sqrt
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from ..kvstore.errors import ConfigError
from ..kvstore.layout import Span
from .band import FULL, Band
from .kernels.kernel import Kernel
from .merge import Accumulator, Partial
from .positions import Positions, positions_of
from .segment import KVSegment
from .tiling import tiles

# Below this many queries a GQA group's heads are read as more queries of one head: each key is then
# read once per group (3-9x faster decode on CPU). From 768 rows on the CPU kernel takes its widest
# blocks anyway; before, folding gets there sooner (a fifth faster at 320 queries).
FOLD_BELOW_TOKENS: Final = 768


def attend(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, band: Band) -> Partial:
    """Attention of query [H, T, D] over key [Hkv, S, D] and value [Hkv, S, Dv], scaled by 1/sqrt(D).

    Query i and key j stand at positions i and j of `band`. Raises ConfigError for a head dim that
    the kernel is unable to take.
    """
    segment = KVSegment(key, value, (Span(0, key.shape[1]),))
    total = Accumulator(query.shape[0], query.shape[1], value.shape[2], query.device)
    attend_segment(total, 0, kernel, query, Positions([Span(0, query.shape[1])]), segment, band)
    return total.result()


def attend_segment(
    total: Accumulator,
    start: int,
    kernel: Kernel,
    query: Tensor,
    positions: Positions,
    segment: KVSegment,
    band: Band,
) -> None:
    """Merge what query [H, T, D], standing at `positions`, sees of one segment into `total` from its query `start`."""
    assert query.shape[1] == len(positions), "positions name every query"
    keys, value_dim = positions_of(segment.spans), segment.value.shape[2]
    for tile in tiles(positions, keys, band, kernel.capabilities.takes):
        (a, b), (c, d) = tile.queries, tile.keys
        sees = tile.band or _mask(positions.tensor(a, b, query.device), keys.tensor(c, d, query.device), band)
        key, value = segment.key[:, c:d], segment.value[:, c:d]
        if segment.latent and not kernel.capabilities.value_dim_differs:
            value = key  # the further columns are computed and dropped, which is cheaper than a padded copy
        part = _call(kernel, query[:, a:b], key, value, sees)
        total.add(Partial(part.out[..., :value_dim], part.lse), start + a)


def _mask(queries: Tensor, keys: Tensor, band: Band) -> Tensor:
    """True [T, S] where a key is hidden from a query."""
    distance = keys[None, :] - queries[:, None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if band.first is not None:
        hidden |= distance < band.first
    if band.last is not None:
        hidden |= distance > band.last
    return hidden


def _call(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, sees: Band | Tensor) -> Partial:
    """One kernel call, or the dense fallback for what the kernel takes no mask for. A mask says what is hidden."""
    assert query.shape[0] % key.shape[0] == 0, "query heads are a multiple of kv heads"
    scale = 1.0 / sqrt(query.shape[2])
    if not isinstance(sees, Tensor):
        out, lse = _shaped(kernel, query, key, value, sees, scale)
    elif not kernel.capabilities.masks:
        out, lse = _dense(query, key, value, sees, scale)
    else:
        additive = torch.zeros(sees.shape, dtype=query.dtype, device=query.device).masked_fill_(sees, -inf)
        out, lse = _shaped(kernel, query, key, value, additive, scale)
        blind = sees.all(-1)  # kernels do not agree on what such rows get
        out, lse = out.masked_fill(blind[:, None], 0.0), lse.masked_fill(blind, -inf)
    return Partial(out.to(torch.float32), lse.to(torch.float32))


def _shaped(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, sees: Band | Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """A call with dims, kv heads and the base of the lse as the kernel has them."""
    capabilities = kernel.capabilities
    heads, tokens, dim = query.shape
    kv_heads, value_dim = key.shape[0], value.shape[2]
    width = _width(kernel, dim, value.shape[2])
    query, key = _padded(query, width), _padded(key, width)
    if not capabilities.value_dim_differs:
        value = _padded(value, width)
    folds = sees is FULL and (tokens < FOLD_BELOW_TOKENS or not capabilities.gqa)
    if folds:
        query = query.reshape(kv_heads, -1, width)
    elif not capabilities.gqa:
        key, value = (part.repeat_interleave(heads // kv_heads, 0) for part in (key, value))
    out, lse = kernel.call(query, key, value, sees, scale)
    if folds:
        out, lse = out.reshape(heads, tokens, -1), lse.reshape(heads, tokens)
    if capabilities.lse_base != e:
        lse = lse * log(capabilities.lse_base)
    return out[..., :value_dim], lse


def _width(kernel: Kernel, dim: int, value_dim: int) -> int:
    """The head dim that the kernel computes with."""
    capabilities = kernel.capabilities
    wide = dim if capabilities.value_dim_differs else max(dim, value_dim)
    width = -(-wide // capabilities.head_dim_multiple) * capabilities.head_dim_multiple
    if capabilities.head_dim_max is not None and width > capabilities.head_dim_max:
        raise ConfigError(f"{kernel.name} takes head dims up to {capabilities.head_dim_max}, not {wide}; use another")
    return width


def _padded(part: Tensor, width: int) -> Tensor:
    """Zeros behind the dim: they change neither scores nor the columns that are kept."""
    return part if part.shape[2] == width else functional.pad(part, (0, width - part.shape[2]))


def _dense(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention by matrix products in float32, for masks of a few hundred queries."""
    heads, tokens, _ = query.shape
    kv_heads = key.shape[0]
    folded = query.float().reshape(kv_heads, -1, query.shape[2])
    scores = (folded @ key.float().transpose(1, 2)).view(heads, tokens, -1) * scale
    scores = scores.masked_fill(hidden, -inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -inf, 0.0).unsqueeze(-1))
    out = weights.view(kv_heads, -1, scores.shape[2]) @ value.float()
    return out.view(heads, tokens, -1), lse
