"""Identity: what a checkpoint directory is, without its weights in memory and without torch: config, files, KVSpec."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from ..kvstore.errors import InvalidSpec
from ..kvstore.spec import KVSpec, LayerGroup, sized
from .config import ModelConfig, parse_config, parse_eos

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
GENERATION_FILE: Final = "generation_config.json"
FETCH_AGAIN: Final = "fetch or copy the checkpoint again"
HASHED_AT_ONCE_BYTES: Final = 4 << 20


def read_config(directory: Path) -> ModelConfig:
    """The config in `directory`, with the end tokens of its generation_config.json, if any. Raises InvalidSpec."""
    config = parse_config(read_json(directory / CONFIG_FILE))
    generation = directory / GENERATION_FILE
    ends = parse_eos(read_json(generation)) if generation.exists() else ()
    return replace(config, eos=ends or config.eos)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, whole or sharded, by name. Raises InvalidSpec."""
    if (directory / WEIGHTS_FILE).exists():
        return [directory / WEIGHTS_FILE]
    index = directory / INDEX_FILE
    if not index.exists():
        raise InvalidSpec(
            f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; convert other formats with transformers' "
            "save_pretrained"
        )
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InvalidSpec(f"{index} has no weight_map from tensors to files; {FETCH_AGAIN}")
    paths = [directory / name for name in sorted(set(shards.values()))]
    missing = [path.name for path in paths if not path.exists()]
    if missing or not paths:
        raise InvalidSpec(f"{directory} lacks weight files: {', '.join(missing) or 'the index names none'}")
    return paths


def digest_of(directory: Path, progress: Callable[[int, int], None] | None = None) -> str:
    """32 hex digits over the config and every weight byte: the model's identity.

    `progress` gets the bytes read so far and those of all files. Raises InvalidSpec.
    """
    paths = [directory / CONFIG_FILE, *weight_files(directory)]
    digest = hashlib.blake2b(digest_size=16, person=b"holdfast-model")
    buffer = memoryview(bytearray(HASHED_AT_ONCE_BYTES))
    done = 0
    try:
        total = sum(path.stat().st_size for path in paths)
        for path in paths:
            of_file = hashlib.blake2b()
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    of_file.update(buffer[:count])
                    done += count
                    if progress is not None:
                        progress(done, total)
            digest.update(of_file.digest())
    except OSError as error:
        raise InvalidSpec(f"{error.filename or directory} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def spec_of(config: ModelConfig, digest: str, adapter: str = "") -> KVSpec:
    """The KV that a model makes: one GQA group of all layers, extents of the standard size.

    Layers with a window keep all their KV, as the others do: a document is stored once for whatever is asked of it
    later, and the shapes are the same. The window is part of the identity by way of `digest`, which covers config.json.
    """
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises InvalidSpec."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidSpec(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise InvalidSpec(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidSpec(f"{path} is not a JSON object")
    return content
