"""Layouts: a layout, and a shard that has one, as messages say them."""

from __future__ import annotations

import msgspec

from .layout import Layout, Run


class LayoutMessage(msgspec.Struct, frozen=True, array_like=True):
    """A layout: runs as (start, stop, rank)."""

    runs: list[tuple[int, int, int]]
    cp: int
    tp: int

    @staticmethod
    def of(layout: Layout) -> LayoutMessage:
        """Encode."""
        return LayoutMessage([(run.start, run.stop, run.rank) for run in layout.runs], layout.cp, layout.tp)

    def layout(self) -> Layout:
        """Decode. Raises LayoutError for runs that are no layout."""
        return Layout(tuple(Run(*run) for run in self.runs), self.cp, self.tp)


class ShardMessage(msgspec.Struct, frozen=True, array_like=True):
    """A shard in a group, as its ranks know it."""

    id: int
    generation: int
    layout: LayoutMessage
