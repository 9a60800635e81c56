"""WeightFiles: the safetensors files of a checkpoint, read tensor by tensor, and of each tensor only what is asked for.

Files are mapped: on a CPU, and without a cast, what is read stays a view of the page cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kvstore.errors import InvalidSpec, MissingExtra
from .identity import FETCH_AGAIN, weight_files

try:
    from safetensors import SafetensorError, safe_open
except ImportError as error:
    raise MissingExtra("checkpoints need safetensors: pip install 'holdfast[runner]'") from error


class FileTensor:
    """See weights.Sliced; what is read lands on one device, in one dtype."""

    def __init__(self, part: Any, device: str, dtype: torch.dtype, read: Callable[[int], None]) -> None:
        """`read` hears how many elements the tensor has whenever some of it is read."""
        self._part = part
        self._device = device
        self._dtype = dtype
        self._read = read

    @property
    def shape(self) -> tuple[int, ...]:
        """See Sliced."""
        return tuple(self._part.get_shape())

    def __getitem__(self, index: Any, /) -> Tensor:
        found: Tensor = self._part[index]
        self._read(prod(self.shape))
        return found.to(self._device, self._dtype)


class WeightFiles(Mapping[str, FileTensor]):
    """Tensors by name. `progress` gets the elements of tensors read so far, and those of all tensors."""

    def __init__(
        self, directory: Path, device: str, dtype: torch.dtype, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Open the files. Raises InvalidSpec naming the one that is missing or damaged."""
        self._tensors: dict[str, FileTensor] = {}
        self._progress = progress
        self._done = 0
        for path in weight_files(directory):
            try:
                file: Any = safe_open(path, "pt", device="cpu")
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    self._tensors[name] = FileTensor(file.get_slice(name), device, dtype, self._count)
            except (SafetensorError, OSError) as error:
                raise InvalidSpec(f"{path} cannot be read as safetensors ({error}); {FETCH_AGAIN}") from error
        self._total = sum(prod(tensor.shape) for tensor in self._tensors.values())

    def _count(self, elements: int) -> None:
        self._done += elements
        if self._progress is not None:
            self._progress(self._done, self._total)

    def __getitem__(self, name: str) -> FileTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
