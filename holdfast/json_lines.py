"""Files of JSON lines, gzip where the name ends in .gz. Equal records make equal files: they have no name and time."""

from __future__ import annotations

import gzip
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import msgspec

from .kvstore.errors import InvalidRequest

LEVEL: Final = 3  # of gzip: more takes longer than what is written takes to find out


class JsonLines:
    """Written line by line; complete when closed."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidRequest when the file cannot be made."""
        self._encoder = msgspec.json.Encoder()
        try:
            self._raw = path.open("wb")
        except OSError as error:
            raise InvalidRequest(f"cannot write {path} ({error.strerror}); name another file") from error
        self._file: IO[bytes] | gzip.GzipFile = self._raw
        if path.suffix == ".gz":
            self._file = gzip.GzipFile(filename="", mode="wb", compresslevel=LEVEL, fileobj=self._raw, mtime=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._raw.close()

    def write(self, record: dict[str, Any]) -> None:
        """One line."""
        self._file.write(self._encoder.encode(record) + b"\n")
