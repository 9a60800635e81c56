"""Simulations: a trace, a policy, a capacity; what would have been saved. The metric is that of the project's goals.

    c(s) = 2 N s + 2 L d s^2            floating point operations to prefill s tokens (causal attention)
    prefill_seconds_saved = sum c(hit tokens) / sum c(input tokens)      over all requests, no warm-up left out
    token_hit_ratio = sum hit tokens / sum input tokens
    hit tokens = min(hit units x unit tokens, input tokens)
    capacity in units = int(per cent x different units of the trace / 100)

of a 70B-class model: N = 70e9 parameters, L = 80 layers, d = 8192, KV of 327,680 bytes a token (bf16, 8 kv heads).
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from .eviction.belady import Belady
from .eviction.cache import Cache
from .eviction.policy import POLICIES, Policy, Worth
from .eviction.replay import Step, replay
from .eviction.use import UnitId
from .eviction.victims import ALL_SCORED
from .kvstore.errors import InvalidRequest
from .kvstore.sizes import parse_size
from .traces import Trace

PARAMETERS: Final = 70e9
LAYERS: Final = 80
HIDDEN: Final = 8192
KV_BYTES_PER_TOKEN: Final = 327_680
FLOPS_PER_SECOND: Final = 3.56e15  # effective; 100K tokens take 7.6 s
DEFAULT_POLICY: Final = "popularity"
NS_PER_SECOND: Final = 1_000_000_000
PROGRESS_REQUESTS: Final = 64
OFFLINE: Final[Mapping[str, Callable[[Iterable[Sequence[UnitId]]], Policy]]] = {
    "belady": Belady,  # made with all chains to come
}

Item = TypeVar("Item")
Progress = Callable[[int], None]  # requests replayed since the last call
Witness = Callable[[int, int, Step], None]  # number of the request, hit tokens, step


def prefill_flops(token_count: int) -> float:
    """c(s) above."""
    return 2 * PARAMETERS * token_count + 2 * LAYERS * HIDDEN * token_count * token_count


def prefill_seconds(token_count: int) -> float:
    """Seconds to compute the first n tokens of a chain."""
    return prefill_flops(token_count) / FLOPS_PER_SECOND


def recompute_ns(token_count: int) -> float:
    """What finding the first n tokens is worth where a miss is computed again: see eviction.policy.Worth."""
    return prefill_seconds(token_count) * NS_PER_SECOND


@dataclass(frozen=True, slots=True)
class Capacity:
    """As the user said it: per cent of a trace's different units, or bytes of KV."""

    text: str
    percent: float | None
    size_bytes: int

    @classmethod
    def parse(cls, text: str) -> Capacity:
        """Such as 5% or 300GB. Raises InvalidRequest."""
        text = text.strip()
        matched = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)%", text)
        if matched is not None and 0 < float(matched[1]) <= 100:
            return cls(text, float(matched[1]), 0)
        try:
            size_bytes = parse_size(text)
        except ValueError as error:
            raise InvalidRequest(
                f"capacity {text!r}: say 5% of the trace's blocks (at most 100%), or a size such as 300GB"
            ) from error
        return cls(text, None, size_bytes)

    def units(self, trace: Trace) -> int:
        """Whole units that fit. Raises InvalidRequest when that is none."""
        if self.percent is not None:
            found = int(trace.unit_count * self.percent / 100)
        else:
            found = self.size_bytes // (trace.block_tokens * KV_BYTES_PER_TOKEN)
        if found < 1:
            raise InvalidRequest(f"a capacity of {self.text} holds no block of {trace.path.name}; ask for more")
        return found


def check_policy(name: str) -> None:
    """Raises InvalidRequest for an unknown name."""
    if name not in POLICIES and name not in OFFLINE:
        known = ", ".join([*POLICIES, *OFFLINE])
        raise InvalidRequest(f"there is no policy {name!r}; there are {known}")


def described_policies() -> list[dict[str, str]]:
    """What a simulation can replay: the daemon's policies, and those that need the future; a sentence on each."""
    served = [(name, "daemon, simulator", make.__module__) for name, make in POLICIES.items()]
    offline = [(name, "simulator", make.__module__) for name, make in OFFLINE.items()]
    return [{"name": name, "where": where, "what": about(module)} for name, where, module in (*served, *offline)]


def about(module: str) -> str:
    """The first sentence of a module's docstring."""
    text = " ".join((sys.modules[module].__doc__ or "").split())
    return text.partition(". ")[0].removesuffix(".")


def make_policy(name: str, trace: Trace) -> Policy:
    """A policy that has learned nothing yet. Raises InvalidRequest for an unknown name."""
    check_policy(name)
    return OFFLINE[name](trace.chains) if name in OFFLINE else POLICIES[name]()


def leaves_scored(name: str) -> int:
    """Our own policy is replayed as the daemon decides; others exactly, because they are what it is held to."""
    return ALL_SCORED if name == DEFAULT_POLICY else sys.maxsize


@dataclass(slots=True)
class Tally:
    """Sums over requests."""

    requests: int = 0
    hit_tokens: int = 0
    input_tokens: int = 0
    saved_flops: float = 0.0
    asked_flops: float = 0.0

    def add(self, hit_tokens: int, input_tokens: int) -> None:
        """One request."""
        self.requests += 1
        self.hit_tokens += hit_tokens
        self.input_tokens += input_tokens
        self.saved_flops += prefill_flops(hit_tokens)
        self.asked_flops += prefill_flops(input_tokens)


class Timer:
    """Seconds that an iterator takes to make its items: by the clock, and of this thread's CPU for each item."""

    def __init__(self) -> None:
        self.wall_seconds = 0.0
        self.cpu_seconds: list[float] = []

    def timed(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items."""
        while True:
            cpu, wall = time.thread_time(), time.perf_counter()
            item = next(items, None)
            self.wall_seconds += time.perf_counter() - wall
            if item is None:
                return
            self.cpu_seconds.append(time.thread_time() - cpu)
            yield item

    def percentile_ms(self, percent: float) -> float:
        """CPU milliseconds of one item, nearest rank."""
        ordered = sorted(self.cpu_seconds)
        return 1e3 * ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def simulate(
    trace: Trace,
    name: str,
    capacity: Capacity,
    witness: Witness | None = None,
    progress: Progress | None = None,
    worth: Worth = recompute_ns,
) -> dict[str, Any]:
    """One line of `holdfast policy simulate --json`; its --help says what the fields mean.

    `worth` is what a hit saves in the policy's eyes; the result is in prefill-seconds all the same. `seconds` are those
    of the replay: reading the trace, the witness and the progress are not in them.
    Raises InvalidRequest for an unknown policy or a capacity that holds nothing.
    """
    policy, units = make_policy(name, trace), capacity.units(trace)
    unit_bytes = trace.block_tokens * KV_BYTES_PER_TOKEN
    cache = Cache(
        policy,
        capacity_units=units,
        unit_tokens=trace.block_tokens,
        unit_bytes=unit_bytes,
        worth=worth,
        all_scored=leaves_scored(name),
    )
    tally, timer = Tally(), Timer()
    steps = timer.timed(replay((one.request for one in trace.requests), policy, cache))
    for number, (one, step) in enumerate(zip(trace.requests, steps, strict=True)):
        hit_tokens = min(step.hit_units * trace.block_tokens, one.input_tokens)
        tally.add(hit_tokens, one.input_tokens)
        if witness is not None:
            witness(number, hit_tokens, step)
        if progress is not None and number % PROGRESS_REQUESTS == PROGRESS_REQUESTS - 1:
            progress(PROGRESS_REQUESTS)
    return heading(trace, name, capacity, units) | summary(trace, tally, timer)


def heading(trace: Trace, name: str, capacity: Capacity, units: int) -> dict[str, Any]:
    """What was replayed."""
    return {
        "trace": str(trace.path),
        "policy": name,
        "capacity": capacity.text,
        "capacity_blocks": units,
        "block_tokens": trace.block_tokens,
        "unique_blocks": trace.unit_count,
    }


def summary(trace: Trace, tally: Tally, timer: Timer) -> dict[str, Any]:
    """What came of it."""
    touched = trace.touched_units
    cpu_seconds = sum(timer.cpu_seconds)
    return {
        "requests": tally.requests,
        "token_hit_ratio": tally.hit_tokens / max(tally.input_tokens, 1),
        "prefill_seconds_saved": tally.saved_flops / max(tally.asked_flops, 1.0),
        "hit_tokens": tally.hit_tokens,
        "input_tokens": tally.input_tokens,
        "blocks_touched": touched,
        "seconds": timer.wall_seconds,
        "ops_per_second": touched / max(timer.wall_seconds, 1e-9),
        "cpu_seconds": cpu_seconds,
        "cpu_us_per_block": 1e6 * cpu_seconds / max(touched, 1),
        "request_p99_ms": timer.percentile_ms(99),
    }
