"""Ownership: the NVMe directory names the catalog whose segments lie in it.

Without that an unmounted disk, or a setting that was forgotten, looks like a directory whose files are all lost, and
the first reads would write off documents that are durable elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from .errors import StorageFailed
from .segments import SEGMENT_NAME

OWNER_NAME: Final = "owner"


def claim(directory: Path, identity: str, extent_count: int) -> None:
    """Make sure that `directory` is that of the catalog called `identity`, which has rows of `extent_count` extents.

    Raises StorageFailed for another catalog's directory, and for one without segments while there should be some.
    """
    path = directory / OWNER_NAME
    try:
        if path.exists():
            if path.read_text(encoding="utf-8", errors="replace").strip() != identity:
                raise StorageFailed(
                    f"nvme.directory {directory} holds the segments of another catalog; set nvme.directory or "
                    "daemon.data_dir to what belongs together"
                )
            return
        if extent_count and not any(SEGMENT_NAME.fullmatch(entry.name) for entry in directory.iterdir()):
            raise StorageFailed(
                f"the catalog has {extent_count} extents on NVMe, but nvme.directory {directory} has no segments: "
                "mount the disk, or set nvme.directory; if it is lost, `holdfast check --fix` forgets what was there"
            )
        _write(path, identity)
    except OSError as error:
        raise StorageFailed(f"{path}: {error.strerror}") from error


def _write(path: Path, identity: str) -> None:
    """Whole or not at all, and durable."""
    made = path.with_suffix(".new")
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, f"{identity}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    made.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
