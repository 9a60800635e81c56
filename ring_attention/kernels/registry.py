"""The kernels there are, and the choice of one at start."""

from __future__ import annotations

from typing import Final

import torch

from ...kvstore.errors import ConfigError
from .cpu_flash import CPU_FLASH
from .cuda_aten import CUDA_ATEN
from .kernel import Kernel
from .reference import REFERENCE

# By preference: the first that is fit is chosen.
KERNELS: Final[dict[str, Kernel]] = {kernel.name: kernel for kernel in (CPU_FLASH, CUDA_ATEN, REFERENCE)}


def choose_kernel(device: torch.device, dtype: torch.dtype, name: str | None = None) -> Kernel:
    """The named kernel, or the best that is there for tensors of `dtype` on `device`.

    Raises ConfigError for a name that is unknown or unfit, and when nothing is fit.
    """
    if name is None:
        reasons = {kernel.name: kernel.unfit(device, dtype) for kernel in KERNELS.values()}
        for kernel in KERNELS.values():
            if not reasons[kernel.name]:
                return kernel
        raise ConfigError(f"no attention kernel is fit: {'; '.join(reasons.values())}")
    if name not in KERNELS:
        raise ConfigError(f"unknown attention kernel {name!r}; use one of {', '.join(sorted(KERNELS))}")
    if reason := KERNELS[name].unfit(device, dtype):
        raise ConfigError(f"{reason}; use another kernel")
    return KERNELS[name]
