"""Strategies: the exact ways to attend over KV that ranks hold, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from .all_gather import all_gather
from .communicator import Communicator
from .kernels.kernel import Kernel
from .pass_kv import pass_kv
from .pass_q import pass_q
from .share import SequenceShare

# (communicator, kernel, query [H, sum of this rank's T, D] packed in batch order, batch, window)
# -> float32 [H, sum T, Dv]. All ranks call the same one.
Strategy = Callable[[Communicator, Kernel, Tensor, Sequence[SequenceShare], int | None], Tensor]

STRATEGIES: Final[dict[str, Strategy]] = {"pass_kv": pass_kv, "pass_q": pass_q, "all_gather": all_gather}
