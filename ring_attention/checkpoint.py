"""Checkpoints: a Hugging Face directory (config.json, safetensors), read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kvstore.errors import MissingExtra
from .identity import CONFIG_FILE, WEIGHTS_FILE, digest_of, read_config, spec_of, weight_files
from .model import Decoder

try:
    from safetensors.torch import load_file, save_file
except ImportError as error:
    raise MissingExtra("checkpoints need safetensors: pip install 'holdfast[runner]'") from error


def load_model(directory: Path, device: str = "cpu") -> Decoder:
    """The decoder in `directory`, in its own dtype, on `device`.

    Raises InvalidSpec for what is unsupported, missing or malformed.
    """
    config = read_config(directory)
    dtype = getattr(torch, config.dtype)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(directory):
        tensors |= load_file(path, device=device)
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return Decoder(config, spec_of(config, digest_of(directory)), cast)


def save_model(directory: Path, raw_config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors, creating `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(raw_config, indent=2) + "\n")
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
