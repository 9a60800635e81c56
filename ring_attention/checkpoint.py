"""Checkpoints: a Hugging Face directory (config.json, safetensors), read and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .identity import CONFIG_FILE, WEIGHTS_FILE, digest_of, read_config, spec_of
from .model import Decoder
from .weight_files import WeightFiles
from .weight_share import share_of

LoadProgress = Callable[[str, int, int], None]


def load_model(
    directory: Path, device: str = "cpu", tp: int = 1, tp_rank: int = 0, progress: LoadProgress | None = None
) -> Decoder:
    """The decoder in `directory`, in its own dtype, on `device`: all of it, or what rank `tp_rank` of `tp` computes.

    The spec is the whole model's for every rank. `progress` gets ("hashed", bytes so far, bytes of all files) and
    then ("loaded", elements of tensors read so far, elements of all). Raises InvalidSpec for what is unsupported,
    missing or malformed, and for a `tp` that does not divide the model.
    """
    config = read_config(directory)
    share_of(config, tp, tp_rank)  # said before anything long is read
    files = WeightFiles(directory, device, getattr(torch, config.dtype), progress and partial(progress, "loaded"))
    spec = spec_of(config, digest_of(directory, progress and partial(progress, "hashed")))
    return Decoder(config, spec, files, tp, tp_rank)


def save_model(directory: Path, raw_config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors, creating `directory`."""
    from safetensors.torch import save_file  # here, because `weight_files` says it better when it is not installed

    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(raw_config, indent=2) + "\n")
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
