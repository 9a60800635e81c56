"""CheckpointIdentity: the KVSpec of a checkpoint directory, the very one that the built-in runner uses for it.

The digest of the weights is remembered in the user's cache directory, so that 140 GB are read once. Nothing is
written beside the checkpoint, and torch is not needed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ..kvstore.errors import InvalidSpec
from ..kvstore.spec import KVSpec, LayerGroup, sized
from ..ring_attention.config import FULL, SLIDING, parse_config
from ..ring_attention.identity import CONFIG_FILE, digest_of, read_json, spec_of, weight_files

REMEMBERED_MAX: Final = 256  # checkpoints; those used longest ago are forgotten
REMEMBERED_BYTES_MAX: Final = 4 << 20  # a larger file is not ours
SETTLED_NS: Final = 2_000_000_000  # a file changed later than this could change again within one tick of its clock
LOCK_SECONDS: Final = 600.0
LOCK_RETRY_SECONDS: Final = 0.1
DIGEST: Final = re.compile(r"[0-9a-f]{32}")
TEXT_CONFIG: Final = "text_config"  # where models of several modalities keep their decoder's shape
LATENT: Final = "kv_lora_rank"

Files = list[list[str | int]]  # by file: name, size in bytes, mtime and ctime in ns, inode


def checkpoint_spec(directory: str | Path, dtype: str | None = None) -> KVSpec:
    """The KV that the model in `directory` makes, with a digest of its config and weights as its identity.

    `dtype` is that of the KV where the engine does not keep it in the checkpoint's. Equal directories, wherever they
    lie, have equal specs. Raises InvalidSpec for what is no checkpoint, or one whose config does not tell its KV.
    """
    path = Path(directory)
    if not path.is_dir():
        raise InvalidSpec(f"{path} is no directory; give a local checkpoint, or name the weights with model_spec()")
    raw = read_json(path / CONFIG_FILE)
    model_spec(raw, "unread", dtype=dtype)  # refuse it before its weights are read
    return model_spec(raw, checkpoint_digest(path), dtype=dtype)


def model_spec(config: Mapping[str, Any], model: str, *, dtype: str | None = None, adapter: str = "") -> KVSpec:
    """The KV of a model with this config.json, whose weights the caller vouches for.

    `model` must change whenever the weights do: KV of equal specs is taken for equal. `adapter` names a LoRA. Raises
    InvalidSpec where the config does not tell the KV's shape.
    """
    try:
        shape = parse_config(config)
    except InvalidSpec as unknown:
        return _generic(config, model, dtype, adapter, unknown)
    return spec_of(replace(shape, dtype=dtype or shape.dtype), model, adapter)


def _generic(config: Mapping[str, Any], model: str, dtype: str | None, adapter: str, unknown: InvalidSpec) -> KVSpec:
    """A spec by the fields that most decoders have, for models that the built-in runner cannot run."""
    nested = config.get(TEXT_CONFIG)
    raw = {**config, **nested} if isinstance(nested, dict) else dict(config)
    heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
    layers, vocabulary = raw.get("num_hidden_layers"), raw.get("vocab_size")
    kv_heads = heads if raw.get("num_key_value_heads") is None else raw["num_key_value_heads"]
    head_dim = raw.get("head_dim")
    if head_dim is None and type(hidden) is int and type(heads) is int and heads > 0:
        head_dim = hidden // heads
    wanted = {
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
    }
    lacking = [name for name, value in wanted.items() if type(value) is not int or value < 1]
    types = raw.get("layer_types") or []
    strange = sorted({str(kind) for kind in types} - {FULL, SLIDING}) if isinstance(types, list) else [str(types)]
    if raw.get(LATENT):
        lacking.append(f"(it keeps latents: {LATENT})")
    if lacking or strange:
        reason = f"{CONFIG_FILE} does not tell its KV: {', '.join(lacking + strange)}; make a KVSpec by hand"
        raise InvalidSpec(f"{unknown.message}; {reason}") from unknown
    assert type(layers) is int
    assert type(kv_heads) is int
    assert type(head_dim) is int
    assert type(vocabulary) is int
    group = LayerGroup(layers=tuple(range(layers)), kv_heads=kv_heads, key_dim=head_dim, value_dim=head_dim)
    kept = dtype or str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    spec = KVSpec(
        groups=(group,), dtype=kept, model=model, vocabulary_size=vocabulary, adapter=adapter, extent_blocks=1
    )
    return sized(spec)


def checkpoint_digest(directory: Path) -> str:
    """32 hex digits over a checkpoint's config and weights, read once and remembered until a file changes.

    Several processes that ask at once read it once. Raises InvalidSpec.
    """
    memory = _memory()
    key = str(directory.resolve())
    if memory is None:
        return digest_of(directory)
    with _one_at_a_time(directory):
        files = _files(directory)
        if (known := _remembered(memory).get(key)) is not None and known["files"] == files:
            return str(known["digest"])
        newest_ns = max(int(entry[place]) for entry in files for place in (2, 3))
        settled = time.time_ns() - newest_ns >= SETTLED_NS
        digest = digest_of(directory)
        if _files(directory) != files:
            raise InvalidSpec(f"{directory} was changed while it was read; ask again when it is complete")
        if settled:
            _remember(memory, key, {"files": files, "digest": digest})
        return digest


def _files(directory: Path) -> Files:
    found: Files = []
    for path in [directory / CONFIG_FILE, *weight_files(directory)]:
        try:
            status = path.stat()
        except OSError as error:
            raise InvalidSpec(f"{path} cannot be read: {error.strerror}") from error
        found.append([path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino])
    return found


def _memory() -> Path | None:
    """Where digests are remembered; None for a user without a home."""
    place = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(place) if Path(place).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "holdfast" / "checkpoints.json"


def _remembered(memory: Path) -> dict[str, dict[str, Any]]:
    """By directory, the last used last; what is damaged is not there."""
    try:
        with memory.open("rb") as file:
            found = json.loads(file.read(REMEMBERED_BYTES_MAX))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {
        key: {"files": entry["files"], "digest": entry["digest"]}
        for key, entry in entries
        if isinstance(entry, dict)
        and DIGEST.fullmatch(str(entry.get("digest")))
        and isinstance(entry.get("files"), list)
    }


def _remember(memory: Path, key: str, entry: dict[str, Any]) -> None:
    """Atomically; where it cannot be written, the next process reads the weights again."""
    entries = _remembered(memory)
    entries.pop(key, None)
    entries[key] = entry
    kept = dict(list(entries.items())[-REMEMBERED_MAX:])
    with suppress(OSError):
        memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=memory.parent, delete=False) as file:
            try:
                json.dump(kept, file)
                file.close()
                Path(file.name).replace(memory)
            except OSError:
                Path(file.name).unlink(missing_ok=True)
                raise


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Hold a lock on the directory, so that others find the digest remembered; go on without it where none is given."""
    descriptor = None
    try:
        with suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            deadline = time.monotonic() + LOCK_SECONDS
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(LOCK_RETRY_SECONDS)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
