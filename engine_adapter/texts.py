"""Texts: the tokens of documents, kept in files, for what the store cannot do without them: extend, and recompute.

The store knows documents by keyed hashes, not by their tokens. Files are named by a hash, replaced atomically, verified
by a digest, and bounded in total: the least recently used go first. Whoever lost a file loses an option, no document.
"""

from __future__ import annotations

import hashlib
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ..kvstore.errors import StorageFailed

LIMIT_BYTES: Final = 256 << 20
MAGIC: Final = b"hftext01"
DIGEST_BYTES: Final = 16
HEADER: Final = struct.Struct(f"<8s{DIGEST_BYTES}s")  # magic, digest of what follows
CREATED: Final = struct.Struct("<Q")  # when the document was made, in front of its tokens
SUFFIX: Final = ".tokens"

Tokens = npt.NDArray[np.uint32]


class Texts:
    """One tenant's documents under one model, in a directory that others may share."""

    def __init__(self, directory: Path, tenant: str, fingerprint: bytes, limit_bytes: int = LIMIT_BYTES) -> None:
        """Make the directory. Raises StorageFailed."""
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._root = hashlib.blake2b(fingerprint + tenant.encode(), digest_size=16, person=b"holdfast-text")
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageFailed(f"{directory} cannot keep texts ({error.strerror})") from error

    def put(self, name: str, tokens: npt.NDArray[np.integer] | list[int], created_wall_ns: int) -> None:
        """Remember a document; `created_wall_ns` says which one of that name. What does not fit is not remembered."""
        data = CREATED.pack(created_wall_ns) + np.asarray(tokens).astype("<u4").tobytes()
        path = self._path(name)
        if len(data) > self._limit_bytes:
            self.forget(name)
            return
        made = path.with_suffix(f".{os.getpid()}.new")
        try:
            descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(HEADER.pack(MAGIC, _digest(data)))
                file.write(data)
            made.replace(path)
        except OSError:  # a full disk: a document that is not remembered is still stored
            made.unlink(missing_ok=True)
            self.forget(name)
        self._make_room()

    def get(self, name: str, created_wall_ns: int | None) -> Tokens | None:
        """The tokens of a document; None where they are not known, are damaged, or are of another document.

        Without `created_wall_ns` (nobody knows which document has the name now) the last one's are given.
        """
        path = self._path(name)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        data = content[HEADER.size :]
        if len(data) < CREATED.size or HEADER.unpack_from(content) != (MAGIC, _digest(data)):
            return None
        if created_wall_ns not in (None, *CREATED.unpack_from(data)):
            return None
        return np.frombuffer(data, "<u4", offset=CREATED.size).astype(np.uint32, copy=False)

    def forget(self, name: str) -> None:
        """The document is gone."""
        with suppress(OSError):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        named = self._root.copy()
        named.update(name.encode())
        return self._directory / f"{named.hexdigest()}{SUFFIX}"

    def _make_room(self) -> None:
        """Remove what was not used for longest until the rest fits."""
        found = []
        for path in self._directory.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # another runner removed it meanwhile
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in found) - self._limit_bytes
        for _, size, path in sorted(found):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
