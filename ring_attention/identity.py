"""Identity: what a checkpoint directory is, without its weights in memory and without torch: config, files, KVSpec."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..kvstore.errors import InvalidSpec
from ..kvstore.spec import KVSpec, LayerGroup, sized
from .config import ModelConfig, parse_config

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_config(directory: Path) -> ModelConfig:
    """The config in `directory`. Raises InvalidSpec."""
    return parse_config(_read_json(directory / CONFIG_FILE))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, whole or sharded, by name. Raises InvalidSpec."""
    if (directory / WEIGHTS_FILE).exists():
        return [directory / WEIGHTS_FILE]
    if not (directory / INDEX_FILE).exists():
        raise InvalidSpec(f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    names = sorted(set(_read_json(directory / INDEX_FILE).get("weight_map", {}).values()))
    paths = [directory / name for name in names]
    missing = [path.name for path in paths if not path.exists()]
    if missing or not paths:
        raise InvalidSpec(f"{directory} lacks weight files: {', '.join(missing) or 'the index names none'}")
    return paths


def digest_of(directory: Path) -> str:
    """32 hex digits over the config and every weight byte: the model's identity."""
    digest = hashlib.blake2b(digest_size=16, person=b"holdfast-model")
    for path in [directory / CONFIG_FILE, *weight_files(directory)]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def spec_of(config: ModelConfig, digest: str, adapter: str = "") -> KVSpec:
    """The KV that a model makes: one GQA group of all layers, extents of the standard size."""
    group = LayerGroup(
        layers=tuple(range(config.layers)),
        kv_heads=config.kv_heads,
        key_dim=config.head_dim,
        value_dim=config.head_dim,
    )
    spec = KVSpec(
        groups=(group,),
        dtype=config.dtype,
        model=digest,
        vocabulary_size=config.vocabulary_size,
        rope=json.dumps(asdict(config.rope), sort_keys=True),
        adapter=adapter,
        extent_blocks=1,
    )
    return sized(spec)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InvalidSpec(f"{path} does not exist") from error
    except ValueError as error:
        raise InvalidSpec(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidSpec(f"{path} is not a JSON object")
    return content
