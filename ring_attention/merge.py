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

    A part for all queries that stays the only one is the result as it is. Tokens come before heads
    in memory, as kernels give them and projections read them.
    """

    def __init__(self, heads: int, tokens: int, dim: int, device: torch.device) -> None:
        self._shape = (tokens, heads, dim)
        self._device = device
        self._only: Partial | None = None
        self._running: _Running | None = None

    def add(self, part: Partial, start: int) -> None:
        """Merge `part`, over keys not seen yet, into the queries [start, start + part's T)."""
        if self._running is None:
            if self._only is None and part.lse.shape[1] == self._shape[0]:
                self._only = part
                return
            self._running = _Running(*self._shape, self._device)
            if self._only is not None:
                self._running.add(self._only, 0)
        self._running.add(part, start)

    def result(self) -> Partial:
        """The merge. Rows that saw nothing have out 0 and lse -inf."""
        if self._running is not None:
            return self._running.result()
        return self._only or _Running(*self._shape, self._device).result()


class _Running:
    """`out` [H, T, D], `peak` [H, T] and `sum` [H, T] of exp(lse - peak)."""

    def __init__(self, tokens: int, heads: int, dim: int, device: torch.device) -> None:
        self.out = torch.zeros(tokens, heads, dim, dtype=torch.float32, device=device).transpose(0, 1)
        self.peak = torch.full((tokens, heads), _LOWEST, dtype=torch.float32, device=device).transpose(0, 1)
        self.sum = torch.zeros_like(self.peak)

    def add(self, part: Partial, start: int) -> None:
        """Merge in place."""
        rows = slice(start, start + part.lse.shape[1])
        peak, total = self.peak[:, rows], self.sum[:, rows]
        higher = torch.maximum(peak, part.lse)
        total.mul_(torch.exp(peak.sub_(higher)))
        weight = torch.exp(part.lse - higher)
        total.add_(weight)
        peak.copy_(higher)
        # A sum is at least 1 once anything was seen.
        self.out[:, rows].lerp_(part.out, weight.div_(total.clamp_min(1.0)).unsqueeze(-1))

    def result(self) -> Partial:
        """The merge so far."""
        return Partial(self.out, self.peak + torch.log(self.sum))


def merge(partials: Sequence[Partial]) -> Partial:
    """Join partials of the same queries over disjoint keys, in the order given (so equal inputs give equal bits).

    Associative and commutative up to rounding.
    """
    lse = torch.stack([part.lse for part in partials])
    peak = lse.amax(0).clamp_min_(_LOWEST)
    weights = torch.exp(lse - peak)
    total = weights.sum(0)
    weights = weights.div_(total.clamp_min(1.0)).unsqueeze(-1)
    out = partials[0].out * weights[0]
    for part, weight in zip(partials[1:], weights[1:], strict=True):
        out.addcmul_(part.out, weight)
    return Partial(out, peak + torch.log(total))
