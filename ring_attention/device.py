"""Device: which device a rank computes on, and with how many threads."""

from __future__ import annotations

import torch

from ..kvstore.errors import InvalidRequest


def device_of(kind: str, rank: int) -> torch.device:
    """The rank's device: "cpu", or "cuda" for the rank-th GPU (round-robin). Raises InvalidRequest."""
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise InvalidRequest("device cuda was asked for, and torch sees no GPU; use cpu")
        return torch.device("cuda", rank % torch.cuda.device_count())
    raise InvalidRequest(f"unknown device {kind!r}; use cpu or cuda")


def described(device: torch.device) -> str:
    """The device and how much of it computes, in a few words: what was measured on another says nothing of it."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"{device.type}, threads {torch.get_num_threads()}"


def use_threads(count: int) -> None:
    """Compute with that many threads in this process (0: as many as torch likes)."""
    if count > 0:
        torch.set_num_threads(count)
