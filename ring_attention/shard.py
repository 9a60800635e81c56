"""KVShard: what one rank holds of one document under one layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..kvstore.layout import Layout, Span
from .arena import HBMArena
from .segment import KVSegment, shifted


def already_loaded(layer: int) -> None:
    """The `wait_layer` of a shard whose KV is all there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShard:
    """This rank's rows of the tokens in `layout`, from `row_start` of `arena`.

    `layout` names the tokens of all ranks. `wait_layer(layer)` is called before a layer is first
    read; it blocks while that layer is still being loaded, and raises when loading failed.
    `first_token` is the global position of the layout's token 0.
    """

    arena: HBMArena
    layout: Layout
    row_start: int = 0
    first_token: int = 0
    wait_layer: Callable[[int], None] = already_loaded

    @property
    def end_token(self) -> int:
        """Global position behind the last token."""
        return self.first_token + self.layout.token_count

    def spans(self, rank: int) -> tuple[Span, ...]:
        """The tokens that a rank holds, at global positions."""
        return shifted(self.layout.spans(rank), self.first_token)

    def segment(self, layer: int, spans: tuple[Span, ...]) -> KVSegment:
        """A view of this rank's rows in a layer; `spans` are this rank's."""
        return self.arena.segment(layer, self.row_start, spans)

    def grown(self, fresh: Layout) -> KVShard:
        """The shard with the tokens of `fresh` behind its own."""
        return replace(self, layout=self.layout.then(fresh))

    def copy_rows(self, start: int, into: KVShard, offset: int, stop: int) -> None:
        """Copy this rank's rows [start, stop), all layers of them, to the rows from `offset` + start of another shard.

        Rows count from each shard's first. Raises what the loading of a layer raises.
        """
        if start >= stop:
            return
        for layer in range(self.arena.key.shape[0]):
            self.wait_layer(layer)
        ours = slice(self.row_start + start, self.row_start + stop)
        theirs = slice(into.row_start + offset + start, into.row_start + offset + stop)
        assert theirs.stop <= into.arena.rows, (theirs, into.arena.rows)
        into.arena.key[:, :, theirs] = self.arena.key[:, :, ours]
        into.arena.value[:, :, theirs] = self.arena.value[:, :, ours]
