"""Commands: what the daemon sends to the ranks of a group; they answer each load and save with a MoveDone."""

from __future__ import annotations

from .layouts import LayoutMessage
from .message import Message
from .runs import PartMessage
from .spec import KVSpec


class ShardOpened(Message, frozen=True):
    """The shard's rows begin at `row` on this rank; its first tokens are there already.

    `native` is the spec of its extents where they keep an engine's pages: they are decoded into the rows.
    """

    shard: int
    generation: int
    layout: LayoutMessage
    row: int
    resident_tokens: int
    native: KVSpec | None = None


class LoadCommand(Message, frozen=True):
    """Copy these layers of these extents from DDR into the shard's rows."""

    order: int
    shard: int
    parts: list[PartMessage]
    layer_start: int
    layer_stop: int


class SaveCommand(Message, frozen=True):
    """Copy this rank's share of these extents from the shard's rows into DDR."""

    order: int
    shard: int
    parts: list[PartMessage]


class ShardClosed(Message, frozen=True):
    """Forget the shard; with a reason: fail whoever waits for its layers."""

    shard: int
    reason: str


Command = ShardOpened | LoadCommand | SaveCommand | ShardClosed
