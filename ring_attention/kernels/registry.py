"""The kernels there are, and the choice of one at start."""

from __future__ import annotations

from typing import Final

import torch

from ...kvstore.errors import ConfigError
from .cpu_flash import CPU_FLASH
from .cuda_aten import CUDA_ATEN
from .flash_attn import FLASH_ATTN
from .kernel import Kernel
from .reference import REFERENCE
from .torch_varlen import TORCH_VARLEN

# By preference: the first that is fit is chosen.
KERNELS: Final[dict[str, Kernel]] = {
    kernel.name: kernel for kernel in (CPU_FLASH, TORCH_VARLEN, CUDA_ATEN, FLASH_ATTN, REFERENCE)
}


def unfit_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Why each kernel is unable to serve tensors of `dtype` on `device`, or empty; by preference."""
    reasons = {name: kernel.unfit(device, dtype) for name, kernel in KERNELS.items()}
    return {name: str(reason or "") for name, reason in reasons.items()}


def choose_kernel(device: torch.device, dtype: torch.dtype, name: str | None = None) -> Kernel:
    """The named kernel, or the best that is there for tensors of `dtype` on `device`.

    Raises ConfigError for a name that is unknown or unfit, and when nothing is fit; MissingExtra for
    one that has to be installed.
    """
    if name is None:
        for kernel in KERNELS.values():  # no further than needed: to ask one may import a large package
            if kernel.unfit(device, dtype) is None:
                return kernel
        raise ConfigError(f"no attention kernel is fit: {'; '.join(unfit_kernels(device, dtype).values())}")
    if name not in KERNELS:
        raise ConfigError(f"unknown attention kernel {name!r}; use one of {', '.join(sorted(KERNELS))}")
    if reason := KERNELS[name].unfit(device, dtype):
        raise reason
    return KERNELS[name]
