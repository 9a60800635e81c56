"""Kernel: one way to compute (out, lse), and what it can do.

Shapes: H query heads, Hkv kv heads (H a multiple of Hkv), T query tokens, S key tokens, D key dim,
Dv value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from math import e
from typing import TypeVar

import torch
from torch import Tensor

from ...kvstore.errors import ConfigError, HoldfastError
from ..band import FULL, Band


class Corner(StrEnum):
    """Which corner a causal mask is aligned to when there are more keys than queries, or fewer."""

    TOP_LEFT = "top-left"
    BOTTOM_RIGHT = "bottom-right"
    SQUARES_ONLY = "squares only"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a kernel takes; `attend` arranges the rest.

    `gqa`: fewer kv heads than query heads, as they are. `window`: any band that every query and
    every key has a part in. `masks`: an additive mask [T, S] of the query's dtype. `varlen`: several
    sequences in one launch. `lse_base`: of its log-sum-exp. `head_dim_max`: None if there is no
    limit. `head_dim_multiple`: dims are padded to it. `value_dim_differs`: Dv may be another than D.
    """

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    gqa: bool
    causal_corner: Corner
    window: bool = False
    masks: bool = False
    varlen: bool = False
    lse_base: float = e
    head_dim_max: int | None = None
    head_dim_multiple: int = 1
    value_dim_differs: bool = False

    def takes(self, band: Band, tokens: int, rows: int) -> bool:
        """Whether one call computes that band between indices."""
        if band == FULL or self.window:
            return True
        if self.causal_corner is Corner.SQUARES_ONLY and tokens != rows:
            return False
        return band == Band(last=rows - tokens if self.causal_corner is Corner.BOTTOM_RIGHT else 0)


# (query [H, T, D], key [Hkv, S, D], value [Hkv, S, Dv], band or additive mask [T, S], scale of the scores)
# -> (out [H, T, Dv], lse [H, T]). T and S are positive; every query sees a key unless there is a mask.
Call = Callable[[Tensor, Tensor, Tensor, Band | Tensor, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel of the registry. `obstacle()` is why it is unable to run on this machine, if so."""

    name: str
    capabilities: Capabilities
    call: Call
    obstacle: Callable[[], HoldfastError | None]

    def unfit(self, device: torch.device, dtype: torch.dtype) -> HoldfastError | None:
        """Why it is no kernel for these tensors here, if so: ConfigError or MissingExtra."""
        if device.type not in self.capabilities.devices:
            devices = ", ".join(sorted(self.capabilities.devices))
            return ConfigError(f"the kernel {self.name} runs on {devices}, not on {device.type}; use another")
        if dtype not in self.capabilities.dtypes:
            dtypes = ", ".join(sorted(_named(known) for known in self.capabilities.dtypes))
            return ConfigError(f"the kernel {self.name} computes in {dtypes}, not in {_named(dtype)}; use another")
        return self.obstacle()


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def nothing_lacks() -> None:
    """The `obstacle` of a kernel that torch brings along."""


Side = TypeVar("Side")


def window_of(band: Band, tokens: int, rows: int, open_side: Side) -> tuple[int | Side, int | Side]:
    """(left, right) as FlashAttention counts them: query i sees [i + S - T - left, i + S - T + right].

    Not negative if every query and every key has a part in the band, which `tiling` sees to.
    """
    left = open_side if band.first is None else rows - tokens - band.first
    right = open_side if band.last is None else band.last - (rows - tokens)
    return left, right
