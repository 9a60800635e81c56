"""Agent: the residency agent in a rank's process. Loads, saves and forgets shards as the daemon commands.

Commands are carried out in order on one thread, layer by layer, so that the runner can compute on the first layers
while the last still come. It knows rows and copies, no model. When the daemon goes away, everything it opened is
void, and the agent registers again, empty, when the daemon is back.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..kvstore.client import Client
from ..kvstore.clock import Clock
from ..kvstore.commands import Command, LoadCommand, SaveCommand, ShardClosed, ShardOpened
from ..kvstore.errors import DaemonUnavailable, DeadlineExceeded, GroupFailed, HoldfastError
from ..kvstore.geometry import extent_geometry
from ..kvstore.layout import Copy, Layout, clipped, copies, extent_holding, shard_holding
from ..kvstore.runs import PartMessage
from ..kvstore.spec import KVSpec
from ..kvstore.wire import MoveDone
from .paging import Arena, Paging

RETRY_SECONDS: Final = 0.2
CLOSED_KEPT: Final = 64  # failed shards remembered for whoever still waits for them


@dataclass(eq=False, slots=True)
class _Shard:
    generation: int
    layout: Layout
    row: int
    tokens: list[int]  # present, by layer
    native: KVSpec | None = None  # where its extents keep an engine's pages
    error: str = ""


@dataclass(frozen=True, slots=True)
class Seat:
    """Which rank of which group this is, and what it computes with."""

    group: str
    rank: int
    cp: int
    tp: int = 1
    kernel: str = ""
    communicator: str = ""
    device: str = ""


class Agent:
    """Runs from construction to `close`. `arena` belongs to the caller, which writes to rows only while it may."""

    def __init__(self, socket: Path, tenant: str, seat: Seat, spec: KVSpec, arena: Arena, clock: Clock) -> None:
        """Connect and register. Raises DaemonUnavailable, or the daemon's refusal."""
        self._socket = socket
        self._tenant = tenant
        self._seat = seat
        self._spec = spec
        self._arena = arena
        self._clock = clock
        self._layers = len(spec.groups[0].layers)
        self._extent = extent_geometry(spec)
        self._changed = threading.Condition()
        self._shards: dict[int, _Shard] = {}
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._lost = threading.Event()
        self._client = self._connect([])
        self._thread = threading.Thread(target=self._run, name="holdfast-agent", daemon=True)
        self._thread.start()

    def _connect(self, resume: list[int]) -> Client:
        client = Client(
            self._socket,
            self._tenant,
            resume=resume,
            on_command=self._commands.put,
            on_lost=self._on_lost,
            on_unmap=self._arena.forget,
        )
        try:
            fingerprint = client.register_spec(self._spec)
            seat = self._seat
            client.register_rank(
                seat.group,
                seat.rank,
                seat.cp,
                seat.tp,
                fingerprint,
                self._arena.rows,
                kernel=seat.kernel,
                communicator=seat.communicator,
                device=seat.device,
            )
        except HoldfastError:
            client.close()
            raise
        return client

    # For the runner ----------------------------------------------------------------------------

    def row(self, shard: int, generation: int, deadline_ns: int) -> int:
        """The shard's first row here, as soon as this opening of it has been announced."""
        return self._await(shard, generation, deadline_ns, lambda _: True).row

    def waiter(self, shard: int, generation: int, token_count: int, deadline_ns: int) -> Callable[[int], None]:
        """A function that blocks until the shard's first tokens are here in a given layer.

        It raises GroupFailed when loading failed or the shard was closed, DeadlineExceeded after the deadline.
        """

        def wait_layer(layer: int) -> None:
            self._await(shard, generation, deadline_ns, lambda state: state.tokens[layer] >= token_count)

        return wait_layer

    def _await(self, shard: int, generation: int, deadline_ns: int, reached: Callable[[_Shard], bool]) -> _Shard:
        with self._changed:
            while True:
                if self._lost.is_set() or generation < self._client.number:  # numbers grow over all daemons' lives
                    raise DaemonUnavailable("the daemon that opened this shard went away")
                state = self._shards.get(shard)
                if state is not None and state.generation == generation:
                    if state.error:
                        raise GroupFailed(f"loading failed: {state.error}")
                    if reached(state):
                        return state
                elif state is not None and state.generation > generation:
                    raise GroupFailed(f"shard {shard} was opened again meanwhile")
                left_ns = deadline_ns - self._clock.monotonic_ns()
                if left_ns <= 0:
                    raise DeadlineExceeded(f"shard {shard} did not load in time")
                self._changed.wait(min(left_ns / 1e9, 1.0))

    def close(self) -> None:
        """Leave the daemon: the group ends with its first rank that leaves."""
        self._closing.set()
        self._commands.put(None)
        self._thread.join(10.0)
        self._client.close()

    # Commands ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                command = self._commands.get()
                if command is not None:
                    self._carry_out(command)
                elif not self._closing.is_set() and not self._client.is_open:  # a failed attempt of ours says so too
                    self._reconnect()
        finally:
            if not self._closing.is_set():  # a bug of ours: nobody may wait for what will never be carried out
                self._on_lost()
                self._client.close()

    def _carry_out(self, command: Command) -> None:
        match command:
            case ShardOpened():
                with self._changed:
                    present = [command.resident_tokens] * self._layers
                    layout = command.layout.layout()
                    opened = _Shard(command.generation, layout, command.row, present, command.native)
                    self._shards[command.shard] = opened
                    self._changed.notify_all()
            case ShardClosed(shard, reason):
                self._close_shard(shard, reason)
            case LoadCommand():
                self._answer(command.order, lambda: self._load(command))
            case SaveCommand():
                self._answer(command.order, lambda: self._save(command))

    def _close_shard(self, shard: int, reason: str) -> None:
        with self._changed:
            state = self._shards.get(shard)
            if state is None:
                return
            state.error = reason or "the shard was closed"
            if not reason:
                del self._shards[shard]
            failed = [number for number, other in self._shards.items() if other.error]
            for number in failed[:-CLOSED_KEPT]:
                del self._shards[number]
            self._changed.notify_all()

    def _answer(self, order: int, move: Callable[[], int]) -> None:
        started_ns = self._clock.monotonic_ns()
        code = message = ""
        size_bytes = 0
        try:
            size_bytes = move()
        except HoldfastError as error:
            code, message = error.code, error.message
        took_ns = self._clock.monotonic_ns() - started_ns
        try:
            self._client.move_done(MoveDone(order, size_bytes, took_ns, took_ns, code, message))
        except DaemonUnavailable:
            return  # `_on_lost` has heard of it too

    def _load(self, command: LoadCommand) -> int:
        state = self._state(command.shard)
        moves, views = self._moves(state, command.parts)
        paging = Paging(state.native) if state.native is not None else None
        for layer in range(command.layer_start, command.layer_stop):
            if paging is not None:
                paging.load(self._arena, moves, views, layer)
            else:
                self._arena.load(moves, views, self._extent, layer, layer + 1)
            with self._changed:
                state.tokens[layer] += sum(part.valid_tokens for part in command.parts)
                self._changed.notify_all()
        return self._bytes(moves, command.layer_stop - command.layer_start)

    def _save(self, command: SaveCommand) -> int:
        state = self._state(command.shard)
        moves, views = self._moves(state, command.parts)
        saves = [move.reversed() for move in moves]
        if state.native is not None:
            paging = Paging(state.native)
            for layer in range(self._layers):
                paging.save(self._arena, saves, views, layer)
        else:
            self._arena.save(saves, views, self._extent, 0, self._layers)
        return self._bytes(moves, self._layers)

    def _state(self, shard: int) -> _Shard:
        state = self._shards.get(shard)
        if state is None:
            raise GroupFailed(f"shard {shard} is not open on rank {self._seat.rank}")
        return state

    def _moves(self, state: _Shard, parts: Sequence[PartMessage]) -> tuple[list[Copy], dict[int, memoryview]]:
        """Copies from these extents into this rank's rows, and the extents' bytes in shared memory."""
        heads = self._spec.groups[0].kv_heads
        mine = shard_holding(state.layout, self._seat.rank, heads, state.row)
        extents = [extent_holding(i, part.start, part.valid_tokens, heads) for i, part in enumerate(parts)]
        ours = clipped(mine, [(part.start, part.start + part.valid_tokens) for part in parts])
        return list(copies(extents, [ours])), dict(enumerate(self._client.views(parts)))

    def _bytes(self, moves: Sequence[Copy], layers: int) -> int:
        group = self._spec.groups[0]
        row = (group.key_dim + group.value_dim) * self._spec.element_bytes * layers
        return sum(move.row_count * move.head_count for move in moves) * row

    # Loss --------------------------------------------------------------------------------------

    def _on_lost(self) -> None:
        with self._changed:
            self._lost.set()
            self._changed.notify_all()
        self._commands.put(None)

    def _reconnect(self) -> None:
        """The daemon is gone, and with it all that it opened here. Come back, empty, when it does."""
        old = self._client.number
        self._client.close()
        while not self._commands.empty():  # what the old connection still asked for is void
            self._commands.get()
        with self._changed:
            self._shards.clear()
        while not self._closing.wait(RETRY_SECONDS):
            try:
                self._client = self._connect([old])
            except HoldfastError:
                continue
            with self._changed:
                self._lost.clear()
                self._changed.notify_all()
            return
