"""Weights: a checkpoint's tensors by name, of which a rank reads its part only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kvstore.errors import InvalidSpec

Linear = tuple[Tensor, Tensor | None]  # weight [out, in] and bias [out]
Range = tuple[int, int]  # half-open


class Sliced(Protocol):
    """A tensor, or one in a file of which only what is asked for is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's."""
        ...

    def __getitem__(self, index: Any, /) -> Tensor:
        """The part at these slices."""
        ...


class Weights:
    """Named tensors; notices what a checkpoint has and we do not know."""

    def __init__(self, tensors: Mapping[str, Sliced]) -> None:
        self._tensors = tensors
        self._taken: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether there is such a tensor; it counts as known."""
        self._taken.add(name)
        return name in self._tensors

    def vector(self, name: str, size: int) -> Tensor:
        """A whole tensor [size]. Raises InvalidSpec when it is missing or has another shape."""
        return self._checked(name, (size,))[0:size]

    def rows(self, name: str, shape: tuple[int, int], part: Range) -> Tensor:
        """Rows of a matrix of this shape. Raises InvalidSpec as `vector`."""
        return self._checked(name, shape)[slice(*part)]

    def columns(self, name: str, shape: tuple[int, int], part: Range) -> Tensor:
        """Columns of a matrix of this shape, contiguous. Raises InvalidSpec as `vector`."""
        return self._checked(name, shape)[:, slice(*part)].contiguous()

    def joined(self, names: Mapping[str, tuple[int, Range]], width: int) -> Linear:
        """Rows of projections that read the same input [width], as one: by name, all its rows and those wanted."""
        weights = [self.rows(f"{name}.weight", (rows, width), part) for name, (rows, part) in names.items()]
        biases = [
            self._checked(f"{name}.bias", (rows,))[slice(*part)] if self.has(f"{name}.bias") else None
            for name, (rows, part) in names.items()
        ]
        if all(bias is None for bias in biases):
            return torch.cat(weights), None
        filled = [
            weight.new_zeros(len(weight)) if bias is None else bias
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return torch.cat(weights), torch.cat(filled)

    def summed(self, name: str, shape: tuple[int, int], part: Range) -> Linear:
        """Columns of a projection whose results are summed over ranks, and its whole bias, to be added to the sum."""
        weight = self.columns(f"{name}.weight", shape, part)
        return weight, self.vector(f"{name}.bias", shape[0]) if self.has(f"{name}.bias") else None

    def check_all_known(self) -> None:
        """Raises InvalidSpec for tensors that nobody asked for: the model would be another one without them."""
        left = {name for name in self._tensors if not name.endswith("rotary_emb.inv_freq")} - self._taken
        if left:
            raise InvalidSpec(f"the checkpoint has tensors that are not supported: {', '.join(sorted(left)[:5])}")

    def _checked(self, name: str, shape: tuple[int, ...]) -> Sliced:
        if not self.has(name):
            raise InvalidSpec(f"the checkpoint lacks the tensor {name!r}")
        found = self._tensors[name]
        if tuple(found.shape) != shape:
            raise InvalidSpec(
                f"the tensor {name!r} has shape {list(found.shape)}, where config.json says {list(shape)}"
            )
        return found
