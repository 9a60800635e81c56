"""Partial: attention over some of the keys, and how partials join into attention over all of them.

Shapes: H query heads, T query tokens, D value dim. Everything is float32: an accumulator in bf16
drifts to 1e-2 after 64 parts. Formula: arXiv 2411.01783, appendix B, equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# Stands for the lse of a row that has seen nothing: differences with it are finite, and exp of them 0.
_LOWEST: Final = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True)
class Partial:
    """`out` [H, T, D]: softmax(QK)V over some keys; `lse` [H, T]: natural log of the softmax denominator.

    A query that sees none of the keys has out 0 and lse -inf.
    """

    out: Tensor
    lse: Tensor


class Accumulator:
    """The merge of what has been added: `out` is always normalised, the sum of weights is kept beside its peak.

    Tokens come before heads in memory, as kernels give them and projections read them.
    """

    def __init__(self, heads: int, tokens: int, dim: int, device: torch.device) -> None:
        self._out = torch.zeros(tokens, heads, dim, dtype=torch.float32, device=device).transpose(0, 1)
        self._peak = torch.full((tokens, heads), _LOWEST, dtype=torch.float32, device=device).transpose(0, 1)
        self._sum = torch.zeros_like(self._peak)  # of exp(lse - peak)

    def add(self, part: Partial, start: int) -> None:
        """Merge `part`, over keys not seen yet, into the queries [start, start + part's T)."""
        rows = slice(start, start + part.lse.shape[1])
        peak, total = self._peak[:, rows], self._sum[:, rows]
        higher = torch.maximum(peak, part.lse)
        total.mul_(torch.exp(peak.sub_(higher)))
        weight = torch.exp(part.lse - higher)
        total.add_(weight)
        peak.copy_(higher)
        # A sum is at least 1 once anything was seen.
        self._out[:, rows].lerp_(part.out, weight.div_(total.clamp_min(1.0)).unsqueeze(-1))

    def result(self) -> Partial:
        """The merge. Rows that saw nothing have out 0 and lse -inf."""
        return Partial(self._out, self._peak + torch.log(self._sum))


def merge(partials: Sequence[Partial]) -> Partial:
    """Join partials over disjoint keys, in the order given (so equal inputs give equal bits).

    Associative and commutative up to rounding.
    """
    assert partials, "there is something to merge"
    heads, tokens, dim = partials[0].out.shape
    total = Accumulator(heads, tokens, dim, partials[0].out.device)
    for part in partials:
        total.add(part, 0)
    return total.result()
