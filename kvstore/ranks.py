"""Ranks: hands HBM orders to the rank processes of a group, and joins their answers into one outcome.

Each rank has a connection of its own and carries out commands in order. An order ends when every rank has answered; a
rank that is lost ends its group: what it has not answered fails as soon as it can no longer touch the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .commands import Command, LoadCommand, SaveCommand, ShardClosed, ShardOpened
from .errors import GroupFailed, from_code
from .layouts import LayoutMessage
from .orders import CloseShard, LoadShard, OpenShard, Outcome, Part, RankOrder, SaveShard
from .runs import PartMessage
from .wire import MoveDone


@dataclass(eq=False, slots=True)
class _Pending:
    group: str
    waiting: dict[int, int]  # clients that have not answered, and their ranks
    outcome: Outcome = field(default_factory=Outcome)


class Ranks:
    """The seats of every group, as clients and their send functions.

    `finished` must not run the service before it returns: ends are also found while an order is being submitted.
    `serial(slab)` names a slab's present memory.
    """

    def __init__(self, finished: Callable[[int, Outcome], None], serial: Callable[[int], int]) -> None:
        self._finished = finished
        self._serial = serial
        self._seats: dict[int, tuple[str, int, Callable[[Command], None]]] = {}
        self._pending: dict[int, _Pending] = {}

    def add(self, client: int, group: str, rank: int, send: Callable[[Command], None]) -> None:
        """A rank took its seat."""
        self._seats[client] = (group, rank, send)

    def submit(self, order: RankOrder) -> None:
        """Send an order's commands to all ranks of its group."""
        seats = {c: (rank, send) for c, (group, rank, send) in self._seats.items() if group == order.group}
        match order:
            case OpenShard():
                layout = LayoutMessage.of(order.layout)
                for rank, send in seats.values():
                    row = order.rows[rank]
                    present = order.resident_tokens
                    send(ShardOpened(order.shard, order.generation, layout, row, present, order.native))
            case CloseShard():
                for _, send in seats.values():
                    send(ShardClosed(order.shard, order.reason))
            case LoadShard():
                parts = self._parts(order.parts)
                load = LoadCommand(order.id, order.shard, parts, order.layer_start, order.layer_stop)
                self._to_all(order, seats, load)
            case SaveShard():
                self._to_all(order, seats, SaveCommand(order.id, order.shard, self._parts(order.parts)))

    def _to_all(
        self,
        order: LoadShard | SaveShard,
        seats: Mapping[int, tuple[int, Callable[[Command], None]]],
        command: Command,
    ) -> None:
        if not seats:
            error = GroupFailed(f"group {order.group!r} has lost its ranks")
            self._finished(order.id, Outcome(error=error))
            return
        self._pending[order.id] = _Pending(order.group, {client: rank for client, (rank, _) in seats.items()})
        for _, send in seats.values():
            send(command)

    def done(self, client: int, answer: MoveDone) -> None:
        """A rank carried its part out: bytes add up, the slowest rank's time counts."""
        pending = self._pending.get(answer.order)
        if pending is None or client not in pending.waiting:
            return
        outcome = pending.outcome
        error = outcome.error
        if answer.code and error is None:
            error = from_code(answer.code, answer.message)
        outcome = replace(
            outcome,
            size_bytes=outcome.size_bytes + answer.size_bytes,
            busy_ns=max(outcome.busy_ns, answer.busy_ns),
            elapsed_ns=max(outcome.elapsed_ns, answer.elapsed_ns),
            error=error,
        )
        self._answered(answer.order, client, outcome)

    def _answered(self, order_id: int, client: int, outcome: Outcome) -> None:
        pending = self._pending[order_id]
        del pending.waiting[client]
        pending.outcome = outcome
        if not pending.waiting:
            del self._pending[order_id]
            self._finished(order_id, outcome)

    def lost(self, client: int) -> None:
        """A rank's connection ended: its group takes no more orders. It may still be carrying out earlier ones."""
        if client in self._seats:
            group = self._seats[client][0]
            self._seats = {c: other for c, other in self._seats.items() if other[0] != group}

    def owes(self, client: int) -> bool:
        """Whether a client has orders that it has not answered: it may be using their slots."""
        return any(client in pending.waiting for pending in self._pending.values())

    def gone(self, client: int) -> None:
        """A rank holds nothing any more: what it has not answered fails, once the other ranks have answered too."""
        self.lost(client)
        for order_id, pending in list(self._pending.items()):
            if client in pending.waiting:
                error = GroupFailed(f"rank {pending.waiting[client]} of group {pending.group!r} is gone")
                self._answered(order_id, client, replace(pending.outcome, error=error))

    def _parts(self, parts: Sequence[Part]) -> list[PartMessage]:
        return [PartMessage(*p.slot, self._serial(p.slot.slab), p.start, p.valid_tokens) for p in parts]
