"""Grid: a group's ranks as context-parallel x tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .communicator import Communicator


@dataclass(frozen=True, slots=True)
class Grid:
    """Rank r of the group is (cp rank r // tp, tp rank r % tp), as in `kvstore.layout.Layout`.

    `cp` joins the ranks that hold other tokens of the same kv heads, `tp` those that hold other heads of the same
    tokens: None if there is but one of them. Aborting `group` ends both.
    """

    group: Communicator
    cp: Communicator
    tp: Communicator | None

    @classmethod
    def over(cls, group: Communicator, tp: int) -> Grid:
        """Split a group into its parts; all ranks call it. Raises GroupFailed."""
        if tp == 1:
            return cls(group, group, None)
        assert group.size % tp == 0, f"{group.size} ranks are no multiple of tp={tp}"
        rows = [list(range(first, first + tp)) for first in range(0, group.size, tp)]
        columns = [list(range(first, group.size, tp)) for first in range(tp)]
        return cls(group, group.split(columns), group.split(rows))

    def reduce(self, tensor: Tensor) -> None:
        """Sum a tensor in place over the tp ranks. Raises GroupFailed."""
        if self.tp is not None and tensor.numel():
            self.tp.all_reduce(tensor)
