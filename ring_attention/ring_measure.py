"""Ring measure: what a group's ranks do to each other's attention, measured by all of them together.

Over their real communicator, kernel, device and dtype. Every rank must call it; all get the same result, made of each
round's slowest rank, so that all decide alike. Of the rounds the fastest counts, because what else the machine does
only ever adds: where a rank waits for a core, every message looks slow, and differences of times mean nothing. Shapes:
H query heads, Hkv kv heads, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from statistics import median
from typing import Final

import torch
from torch import Tensor

from ..kvstore.calibration import RingSpeed
from ..kvstore.clock import Clock
from .attend import attend
from .band import FULL
from .choice import AttentionShape
from .communicator import Communicator
from .kernels.kernel import Kernel

ROUNDS: Final = 15
BUDGET_NS: Final = 2_500_000_000  # no round begins after that
TRIES: Final = 4
PROBE_NS: Final = 6_000_000  # long against latency, short against what a scheduler gives to another program
QUERIES: Final = 512
LEAST_KEYS: Final = 512
KV_BYTES: Final = 1 << 28  # at most, of the keys and values to attend to
MESSAGE_BYTES: Final = (1 << 16, 1 << 26)
SMALL_BYTES: Final = 1 << 12
STEP_BYTES: Final = 256  # messages are multiples of it, whatever the number of ranks
LEAST_SHARE: Final = 0.05  # of a measured time, where a difference of two would be nothing

NUMBERS: Final = tuple(field.name for field in fields(RingSpeed))

Round = Mapping[str, int]  # nanoseconds of each probe, the slowest rank's


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What was timed: key tokens of calls with many queries and with one, bytes that a rank sends."""

    keys: int
    reads: int
    shift_bytes: int
    exchange_bytes: int


def measure_ring(
    communicator: Communicator,
    kernel: Kernel,
    shape: AttentionShape,
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
) -> RingSpeed:
    """Measure, in a second or two. Raises GroupFailed."""
    assert communicator.size == shape.cp > 1, "one rank has nothing to choose"
    like = torch.zeros(1, dtype=dtype, device=device)
    return _Measurement(communicator, kernel, shape, like, clock).speed()


def shared(communicator: Communicator, speed: RingSpeed | None, device: torch.device) -> RingSpeed | None:
    """What rank 0 has, on all ranks: what it measured or was told. Raises GroupFailed."""
    numbers = torch.zeros(1 + len(NUMBERS), dtype=torch.float64, device=device)
    if speed is not None:
        numbers = torch.tensor([1.0, *(getattr(speed, name) for name in NUMBERS)], dtype=torch.float64, device=device)
    communicator.broadcast(numbers, 0)
    known, *found = numbers.tolist()
    return RingSpeed(**dict(zip(NUMBERS, found, strict=True))) if known else None


def speed_of(shape: AttentionShape, sizes: Sizes, rounds: Sequence[Round]) -> RingSpeed:
    """What the rounds say. Computing bounds an attention call with many queries, reading KV one with a single query."""
    samples = {probe: [one[probe] for one in rounds] for probe in rounds[0]}
    seconds = {probe: min(values) / 1e9 for probe, values in samples.items()}
    spreads = [median(samples[probe]) / 1e9 / seconds[probe] - 1 for probe in ("many", "shift", "exchange", "both")]
    return RingSpeed(
        flops_per_second=QUERIES * sizes.keys * shape.pair_flops / seconds["many"],
        key_bytes_per_second=sizes.reads * shape.kv_token_bytes / seconds["one"],
        bytes_per_second=sizes.shift_bytes / _left(seconds["shift"], seconds["small shift"]),
        latency_ns=seconds["small shift"] * 1e9,
        exchange_bytes_per_second=sizes.exchange_bytes / _left(seconds["exchange"], seconds["small exchange"]),
        exchange_latency_ns=seconds["small exchange"] * 1e9,
        copy_bytes_per_second=sizes.shift_bytes / seconds["copy"],
        overlap=_overlap(seconds["many"], seconds["shift"], seconds["both"]),
        spread=max(spreads),
    )


def _left(whole: float, part: float) -> float:
    """The difference of two measured times, and never nothing."""
    return max(whole - part, LEAST_SHARE * whole)


def _overlap(compute: float, shift: float, both: float) -> float:
    """The part of the shorter that went on beside the longer: 1 if both took as long as the longer alone."""
    return min(1.0, max(0.0, (compute + shift - both) / min(compute, shift)))


class _Measurement:
    """One measurement: tensors of the sizes that take long enough here, and what to do with them."""

    def __init__(
        self, communicator: Communicator, kernel: Kernel, shape: AttentionShape, like: Tensor, clock: Clock
    ) -> None:
        """Messages and operands are of the dtype and on the device of `like`."""
        self._communicator = communicator
        self._kernel = kernel
        self._shape = shape
        self._clock = clock
        self._like = like
        self._queries = self._random(shape.heads, QUERIES, shape.head_dim)

    def speed(self) -> RingSpeed:
        """Grow each probe until it takes long enough, then go round them."""
        began_ns = self._clock.monotonic_ns()
        limits = (LEAST_KEYS, max(LEAST_KEYS, KV_BYTES // self._shape.kv_token_bytes // LEAST_KEYS * LEAST_KEYS))
        keys = self._grown(limits, self._attention)
        reads = self._grown(limits, partial(self._attention, queries=1))
        shift_bytes = self._grown(MESSAGE_BYTES, self._shift)
        exchange_bytes = self._grown(MESSAGE_BYTES, self._exchange)
        many, one = self._attention(keys), self._attention(reads, queries=1)
        probes: dict[str, Callable[[], None]] = {
            "many": many,
            "one": one,
            "small shift": self._shift(SMALL_BYTES),
            "shift": self._shift(shift_bytes),
            "both": self._shift(shift_bytes, many),
            "small exchange": self._exchange(SMALL_BYTES),
            "exchange": self._exchange(exchange_bytes),
            "copy": self._copy(shift_bytes),
        }
        rounds: list[Round] = []
        taken_ns = 0
        while len(rounds) < ROUNDS and (not rounds or taken_ns < BUDGET_NS):
            taken = [self._timed(probe) for probe in probes.values()]
            *agreed, taken_ns = self._slowest([*taken, self._clock.monotonic_ns() - began_ns])
            rounds.append(dict(zip(probes, agreed, strict=True)))
        sizes = Sizes(keys=keys, reads=reads, shift_bytes=shift_bytes, exchange_bytes=exchange_bytes)
        return speed_of(self._shape, sizes, rounds)

    def _grown(self, limits: tuple[int, int], probe_of: Callable[[int], Callable[[], None]]) -> int:
        """The smallest size, doubled from the least, whose probe takes long enough; all ranks agree.

        Always takes: a hiccup of the machine would end the doubling at a size that says nothing.
        """
        size, most = limits
        while size < most:
            probe = probe_of(size)
            if min(self._slowest([self._timed(probe) for _ in range(TRIES)])) >= PROBE_NS:
                break
            size = min(2 * size, most)
        return size

    def _timed(self, probe: Callable[[], None]) -> int:
        """Nanoseconds on this rank, all starting together."""
        self._communicator.barrier()
        self._finish()
        started_ns = self._clock.monotonic_ns()
        probe()
        self._finish()
        return max(1, self._clock.monotonic_ns() - started_ns)

    def _finish(self) -> None:
        if self._like.is_cuda:
            torch.cuda.synchronize(self._like.device)

    def _slowest(self, times_ns: Sequence[int]) -> list[int]:
        """For each, that of the rank that took longest: the same on all ranks."""
        own = torch.tensor(times_ns, dtype=torch.int64, device=self._like.device)
        return [int(one) for one in torch.stack(self._communicator.all_gather(own)).amax(0)]

    # Probes ------------------------------------------------------------------------------------

    def _attention(self, keys: int, queries: int = QUERIES) -> Callable[[], None]:
        shape = self._shape
        query = self._queries[:, :queries]
        key, value = (
            self._random(shape.kv_heads, LEAST_KEYS, dim).repeat(1, keys // LEAST_KEYS, 1)
            for dim in (shape.head_dim, shape.value_dim)
        )
        return lambda: _ignore(attend(self._kernel, query, key, value, FULL))

    def _shift(self, size_bytes: int, beside: Callable[[], None] = lambda: None) -> Callable[[], None]:
        send, receive = self._bytes(size_bytes), self._bytes(size_bytes)

        def probe() -> None:
            work = self._communicator.shift(send, receive)
            beside()
            work.wait()

        return probe

    def _exchange(self, size_bytes: int) -> Callable[[], None]:
        """A rank sends `size_bytes` in all, evenly to the others, and nothing to itself."""
        ranks, own = self._communicator.size, self._communicator.rank
        each = [0 if rank == own else self._share(size_bytes, ranks - 1) for rank in range(ranks)]
        send, receive = [self._bytes(size) for size in each], [self._bytes(size) for size in each]
        return lambda: self._communicator.all_to_all(send, receive).wait()

    def _copy(self, size_bytes: int) -> Callable[[], None]:
        parts = [self._bytes(size_bytes // 2), self._bytes(size_bytes // 2)]
        return lambda: _ignore(torch.cat(parts))

    def _share(self, size_bytes: int, among: int) -> int:
        return max(STEP_BYTES, size_bytes // among // STEP_BYTES * STEP_BYTES)

    def _bytes(self, size_bytes: int) -> Tensor:
        """A message of that length, touched, so that no page of it comes into being while it is timed."""
        return torch.ones(size_bytes // self._like.element_size(), dtype=self._like.dtype, device=self._like.device)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._like.device).to(self._like.dtype)


def _ignore(_: object) -> None:
    """What a probe made is of no use."""
