"""Dense softmax attention in float64, for tests."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ..band import Band
from .kernel import Capabilities, Corner, Kernel, nothing_lacks


def _call(query: Tensor, key: Tensor, value: Tensor, sees: Band | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    group = query.shape[0] // key.shape[0]
    keys, values = key.double().repeat_interleave(group, 0), value.double().repeat_interleave(group, 0)
    scores = query.double() @ keys.transpose(1, 2) * scale
    if isinstance(sees, Tensor):
        scores = scores + sees
    else:
        distance = _distance(query.shape[1], key.shape[1], query.device)
        if sees.first is not None:
            scores = scores.masked_fill(distance < sees.first, -inf)
        if sees.last is not None:
            scores = scores.masked_fill(distance > sees.last, -inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -inf, 0.0).unsqueeze(-1))
    return weights @ values, lse


def _distance(tokens: int, rows: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device)[None, :] - torch.arange(tokens, device=device)[:, None]


REFERENCE = Kernel(
    name="reference",
    capabilities=Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64}),
        gqa=True,
        causal_corner=Corner.TOP_LEFT,
        window=True,
        masks=True,
        value_dim_differs=True,
    ),
    call=_call,
    obstacle=nothing_lacks,
)
