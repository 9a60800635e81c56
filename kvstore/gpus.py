"""Gpus: what the NVIDIA driver says of this machine's GPUs, through nvidia-ml-py. Unknown where it says nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .calibration import Gpu
from .errors import Unavailable


def gpus() -> tuple[Gpu, ...]:
    """Every GPU of this machine. Raises Unavailable, with the reason, where nothing can be known."""
    try:
        import pynvml
    except ImportError as error:
        raise Unavailable("GPU facts need nvidia-ml-py: install holdfast[gpu]") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Unavailable(f"no NVIDIA driver answers ({error})") from error
    try:
        return tuple(_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(question: Callable[..., Any], *more: int) -> Any:
        """The driver's answer, None where it has none: boards differ in what they tell."""
        try:
            return question(handle, *more)
        except nvml.NVMLError:
            return None

    name = ask(nvml.nvmlDeviceGetName)
    memory = ask(nvml.nvmlDeviceGetMemoryInfo)
    states = [ask(nvml.nvmlDeviceGetNvLinkState, link) for link in range(nvml.NVML_NVLINK_MAX_LINKS)]
    return Gpu(
        index=index,
        name=name.decode() if isinstance(name, bytes) else str(name or "unknown"),
        hbm_bytes=memory.total if memory is not None else None,
        hbm_free_bytes=memory.free if memory is not None else None,
        pcie_generation=ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
        pcie_width=ask(nvml.nvmlDeviceGetMaxPcieLinkWidth),
        nvlinks=None if all(state is None for state in states) else sum(bool(state) for state in states),
    )
