"""Adapters: what a LoRA is. Its name and path, which the engine's hashes have, may come to mean other weights."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Final

LOG: Final = logging.getLogger("vllm.holdfast")
CONFIG_FILE: Final = "adapter_config.json"
WEIGHT_FILES: Final = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
DIGEST_BYTES: Final = 16

Files = list[tuple[str, int, int]]  # name, size in bytes, mtime in ns


class Adapters:
    """Digests by path, read once: with its first request, when the engine reads those files as well."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Files, bytes | None]] = {}

    def digest(self, path: str) -> bytes | None:
        """Over config and weights; None where they cannot be told from others. Why is logged, once."""
        directory = Path(path).expanduser()
        try:
            files = _files(directory)
            if path not in self._known:
                self._known[path] = files, _digest(directory, files)
            if self._known[path][0] != files:
                self._refuse(path, "has changed since its first request; restart the engine, or give it another path")
        except OSError as error:
            self._refuse(path, f"cannot be read as a local directory ({error}); download it, and give its path")
        return self._known[path][1]

    def _refuse(self, path: str, why: str) -> None:
        """From now on it is not told."""
        if self._known.get(path, ([], b""))[1] is not None:
            LOG.warning("holdfast: requests of the LoRA adapter %s go on without the cache: it %s", path, why)
        self._known[path] = [], None


def _files(directory: Path) -> Files:
    """Those that the engine reads. Raises OSError for what is no adapter."""
    names = [CONFIG_FILE, *(name for name in WEIGHT_FILES if (directory / name).exists())]
    found = [(directory / name).stat() for name in names]
    if len(names) == 1:
        raise FileNotFoundError(f"{directory} has none of {', '.join(WEIGHT_FILES)}")
    return [(name, status.st_size, status.st_mtime_ns) for name, status in zip(names, found, strict=True)]


def _digest(directory: Path, files: Files) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"holdfast-lora")
    for name, _, _ in files:
        with (directory / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.digest()
