"""Partial: attention over some of the keys, and how partials join into attention over all of them.

Shapes: H query heads, T query tokens, D value dim. Everything is float32: an accumulator in bf16
drifts to 1e-2 after 64 parts. Formula: arXiv 2411.01783, appendix B, equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Partial:
    """`out` [H, T, D]: softmax(QK)V over some keys; `lse` [H, T]: natural log of the softmax denominator.

    A query that sees none of the keys has out 0 and lse -inf.
    """

    out: Tensor
    lse: Tensor


def identity(heads: int, tokens: int, dim: int, device: torch.device) -> Partial:
    """The partial over no keys: merging it changes nothing."""
    out = torch.zeros(heads, tokens, dim, dtype=torch.float32, device=device)
    lse = torch.full((heads, tokens), -inf, dtype=torch.float32, device=device)
    return Partial(out, lse)


def merge(partials: Sequence[Partial]) -> Partial:
    """Join partials over disjoint keys, in the order given (so equal inputs give equal bits).

    Associative and commutative up to rounding.
    """
    assert partials, "use identity() for no partials"
    peak = torch.stack([part.lse for part in partials]).amax(0)
    # A row that no part sees keeps peak -inf; subtracting it from itself would give NaN.
    base = torch.where(peak == -inf, torch.zeros_like(peak), peak)
    total = torch.zeros_like(base)
    out = torch.zeros_like(partials[0].out)
    for part in partials:
        weight = torch.exp(part.lse - base)
        total += weight
        out += part.out * weight.unsqueeze(-1)
    out /= torch.where(total == 0, torch.ones_like(total), total).unsqueeze(-1)
    return Partial(out, base + torch.log(total))


def merge_into(total: Partial, part: Partial, start: int) -> None:
    """Merge `part` in place into the queries [start, start + part's T) of `total`."""
    stop = start + part.lse.shape[1]
    merged = merge([Partial(total.out[:, start:stop], total.lse[:, start:stop]), part])
    total.out[:, start:stop] = merged.out
    total.lse[:, start:stop] = merged.lse
