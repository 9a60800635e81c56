"""Costs: what holding, moving and recomputing KV takes. Pure arithmetic.

Symbols in the formulas: N parameters, L layers, H query heads, d_qk and d_v head widths, P tokens
already cached, T new tokens, S = P + T. Rates are per second, GB is 1e9 bytes, GiB is 2^30. Every
efficiency is a fraction of peak that the caller states; 1.0 means peak and is rarely true.

The four metrics of arXiv 2405.08944 (concurrency, prefilling, decoding, context switching) are
`concurrent_sessions`, `prefill_seconds`, `decode_step_seconds` and `context_switch_seconds`.
`PrefillCurve` and `LinkSpeed` are what the daemon predicts with, from its own measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from .spec import KVSpec

NS_PER_SECOND: Final = 1_000_000_000
LONGEST_NS: Final = 10**15  # eleven days: a prediction fits into a message, whatever was measured or claimed
BYTES_PER_GB: Final = 1_000_000_000


# Sizes


def kv_bytes(*, spec: KVSpec, token_count: int, page_tokens: int = 1, tp: int = 1) -> int:
    """KV bytes of one document over all ranks of a group.

    A sliding layer keeps min(S, window) tokens; pages round up; with more tensor-parallel ranks
    than kv heads each rank still holds one head, so heads are replicated (a latent always is).
    """
    elements = 0
    for group in spec.groups:
        kept = token_count if group.window is None else min(token_count, group.window)
        rounded = -(-kept // page_tokens) * page_tokens
        heads = max(group.kv_heads, tp)
        elements += len(group.layers) * heads * (group.key_dim + group.value_dim) * rounded
    return elements * spec.element_bytes


def concurrent_sessions(
    *,
    gpu_count: int,
    hbm_bytes: float,
    weight_bytes: float,
    session_kv_bytes: float,
    usable_share: float = 1.0,
    overhead_bytes: float = 0.0,
) -> int:
    """Concurrency: floor((G (M u - overhead) - weights) / KV); 0 when weights alone do not fit."""
    free_bytes = gpu_count * (hbm_bytes * usable_share - overhead_bytes) - weight_bytes
    return max(0, math.floor(free_bytes / session_kv_bytes))


def gpus_needed(
    *,
    hbm_bytes: float,
    weight_bytes: float,
    kv_bytes: float,
    usable_share: float = 1.0,
    overhead_bytes: float = 0.0,
) -> int:
    """GPUs that hold weights and KV: ceil((weights + KV) / (M u - overhead)).

    Not yet rounded to a count that divides the heads.
    """
    usable_bytes = hbm_bytes * usable_share - overhead_bytes
    assert usable_bytes > 0, "overhead takes the whole GPU"
    return math.ceil((weight_bytes + kv_bytes) / usable_bytes)


# Computing


def causal_pairs(*, cached_tokens: int, new_tokens: int, window: int | None = None) -> int:
    """(query, key) pairs a causal layer looks at: T P + T (T + 1) / 2, exactly.

    A sliding layer looks at sum of min(i, window) for i in P + 1 .. P + T.
    """
    if window is None:
        return new_tokens * cached_tokens + new_tokens * (new_tokens + 1) // 2
    growing = min(new_tokens, max(0, window - cached_tokens))  # queries that still see everything
    ramp = growing * cached_tokens + growing * (growing + 1) // 2
    return ramp + (new_tokens - growing) * window


def linear_flops(*, active_params: float, new_tokens: int) -> float:
    """FLOPs of everything but attention: 2 N T."""
    return 2.0 * active_params * new_tokens


def attention_flops(*, layers: int, heads: int, qk_dim: int, v_dim: int, pairs: float) -> float:
    """FLOPs of attention: 2 L H (d_qk + d_v) pairs. MLA prefills with its expanded heads."""
    return 2.0 * layers * heads * (qk_dim + v_dim) * pairs


def prefill_flops(
    *,
    active_params: float,
    layers: int,
    heads: int,
    qk_dim: int,
    v_dim: int,
    new_tokens: int,
    cached_tokens: int = 0,
    window: int | None = None,
) -> float:
    """Exact causal prefill: 2 N T + 2 L H (d_qk + d_v) (T P + T (T + 1) / 2).

    One decode step is new_tokens = 1. A model that mixes windows sums `attention_flops` itself.
    """
    pairs = causal_pairs(cached_tokens=cached_tokens, new_tokens=new_tokens, window=window)
    attention = attention_flops(layers=layers, heads=heads, qk_dim=qk_dim, v_dim=v_dim, pairs=pairs)
    return linear_flops(active_params=active_params, new_tokens=new_tokens) + attention


def crossover_tokens(*, active_params: float, layers: int, heads: int, qk_dim: int, v_dim: int) -> float:
    """Document length where attention FLOPs equal the others: 2 N / (L H (d_qk + d_v))."""
    return 2.0 * active_params / (layers * heads * (qk_dim + v_dim))


def prefill_seconds(
    *,
    flops: float,
    gpu_count: int,
    peak_flops_per_second: float,
    compute_efficiency: float,
    parallel_efficiency: float = 1.0,
) -> float:
    """Prefilling: FLOPs / (G F efficiency)."""
    efficiency = compute_efficiency * parallel_efficiency
    return flops / (gpu_count * peak_flops_per_second * efficiency)


def touched_params(*, shared_params: float, expert_params: float, experts: int, top_k: int, batch: int) -> float:
    """Parameters a mixture of experts reads per step: N_shared + N_exp (1 - (1 - k/E)^batch)."""
    return shared_params + expert_params * (1.0 - (1.0 - top_k / experts) ** batch)


def decode_step_seconds(
    *,
    weight_bytes: float,
    batch_kv_bytes: float,
    step_flops: float,
    gpu_count: int,
    hbm_bytes_per_second: float,
    peak_flops_per_second: float,
    memory_efficiency: float = 1.0,
    compute_efficiency: float = 1.0,
) -> float:
    """Decoding roofline: the slower of reading weights and all KV, and computing.

    The step makes one token for each sequence of the batch.
    """
    reading = (weight_bytes + batch_kv_bytes) / (gpu_count * hbm_bytes_per_second * memory_efficiency)
    computing = step_flops / (gpu_count * peak_flops_per_second * compute_efficiency)
    return max(reading, computing)


def parity_miss_ratio(*, heads: int, kv_heads: int) -> float:
    """T / (T + P) at which passing queries and passing KV send equally many bytes: 2 H_kv / H."""
    return 2.0 * kv_heads / heads


# Moving


def move_seconds(
    *,
    size_bytes: float,
    bytes_per_second: float,
    efficiency: float = 1.0,
    parallel_links: int = 1,
    block_count: int = 0,
    block_latency_seconds: float = 0.0,
) -> float:
    """One hop: KV / (n BW efficiency) + blocks x latency. Small blocks pay in the second term."""
    transfer = size_bytes / (parallel_links * bytes_per_second * efficiency)
    return transfer + block_count * block_latency_seconds


def path_seconds(stage_seconds: Sequence[float]) -> float:
    """Several hops that overlap: the slowest one, not the sum. 0 for no hops."""
    return max(stage_seconds, default=0.0)


def context_switch_seconds(
    *,
    out_bytes: float,
    in_bytes: float,
    out_bytes_per_second: float,
    in_bytes_per_second: float,
) -> float:
    """Context switching: one session's KV out, another's in.

    `out_bytes` is 0 when the victim is already clean below.
    """
    return out_bytes / out_bytes_per_second + in_bytes / in_bytes_per_second


class Restore(StrEnum):
    """How to get KV back."""

    LOAD = "load"
    RECOMPUTE = "recompute"


def load_or_recompute(*, load_seconds: float, recompute_seconds: float) -> Restore:
    """The faster one; a tie loads, since that leaves the GPU to others."""
    return Restore.LOAD if load_seconds <= recompute_seconds else Restore.RECOMPUTE


def break_even_bytes_per_second(*, kv_bytes: float, recompute_seconds: float) -> float:
    """The speed above which loading beats recomputing: KV / t_pre. Longer documents lower it."""
    return kv_bytes / recompute_seconds


# Sessions and money


def session_busy_seconds(
    *,
    prefill_seconds: float,
    rounds: int,
    answer_tokens: int,
    token_seconds: float,
    switches: int,
    switch_seconds: float,
) -> float:
    """GPU time of a session: t_pre + R O t_tok + n_sw t_sw. Reading time is not in it."""
    decoding = rounds * answer_tokens * token_seconds
    return prefill_seconds + decoding + switches * switch_seconds


def switch_share(*, switches: int, switch_seconds: float, busy_seconds: float) -> float:
    """Part of the busy time that goes to switching: n_sw t_sw / t_busy."""
    return switches * switch_seconds / busy_seconds


def query_dollars(
    *,
    prefill_seconds: float,
    query_seconds: float,
    gpu_count: int,
    gpu_hour_dollars: float,
    kv_bytes: float,
    gb_hour_dollars: float,
    held_hours: float,
    queries: int,
) -> float:
    """Amortised price of a query: (prefill + holding) / Q + the query's own GPU time."""
    gpu_second_dollars = gpu_count * gpu_hour_dollars / 3600
    holding = kv_bytes / BYTES_PER_GB * gb_hour_dollars * held_hours
    prefill = prefill_seconds * gpu_second_dollars
    return (prefill + holding) / queries + query_seconds * gpu_second_dollars


def break_even_idle_hours(*, prefill_dollars: float, kv_bytes: float, gb_hour_dollars: float) -> float:
    """How long unused KV may be held before prefilling again is cheaper: prefill / (GB x price).

    The price of memory that nobody else wants is 0, and the answer then infinity.
    """
    hourly_dollars = kv_bytes / BYTES_PER_GB * gb_hour_dollars
    return prefill_dollars / hourly_dollars if hourly_dollars else math.inf


# What the daemon measures

COLLINEAR: Final = 1e-6  # squared sine of the angle below which two columns are one


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPoint:
    """One measured prefill: `new_tokens` computed behind `cached_tokens`."""

    cached_tokens: int
    new_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCurve:
    """Prefill time of one model on one group: seconds = a T + b (T P + T (T + 1) / 2).

    The default is Llama-3.1-8B on one H100 at 40 % of 989 TFLOP/s (a = 2 N / F, b = 2 L H (d_qk +
    d_v) / F): a prior for ranking documents before anything was measured, not a promise.
    """

    seconds_per_token: float = 4.06e-5
    seconds_per_pair: float = 1.33e-9
    point_count: int = 0

    def seconds(self, cached_tokens: int, new_tokens: int) -> float:
        """Predicted seconds to prefill `new_tokens` behind `cached_tokens`."""
        pairs = causal_pairs(cached_tokens=cached_tokens, new_tokens=new_tokens)
        return self.seconds_per_token * new_tokens + self.seconds_per_pair * pairs

    def marginal_prefill_ns(self, start: int, stop: int) -> int:
        """Nanoseconds to recompute tokens [start, stop) when all before them are there; LONGEST_NS at most."""
        assert 0 <= start <= stop, (start, stop)
        return round(min(self.seconds(start, stop - start) * NS_PER_SECOND, LONGEST_NS))

    def fitted(self, points: Sequence[PrefillPoint]) -> PrefillCurve:
        """The non-negative least-squares fit to `points`, with this curve as the prior.

        Points that cannot tell a from b (one point, or all nearly alike) scale both instead; no
        points leave this curve. Errors are absolute seconds, so long prefills weigh most.
        """
        rows = [(_columns(point), point.seconds) for point in points if point.new_tokens > 0]
        if not rows:
            return self
        tt = sum(t * t for (t, _), _ in rows)
        tx = sum(t * x for (t, x), _ in rows)
        xx = sum(x * x for (_, x), _ in rows)
        ty = sum(t * y for (t, _), y in rows)
        xy = sum(x * y for (_, x), y in rows)
        determinant = tt * xx - tx * tx
        if determinant < COLLINEAR * tt * xx:
            a, b = self.seconds_per_token, self.seconds_per_pair
            scale = (a * ty + b * xy) / (a * a * tt + 2 * a * b * tx + b * b * xx)
            a, b = a * scale, b * scale
        else:
            a = (ty * xx - xy * tx) / determinant
            b = (xy * tt - ty * tx) / determinant
            if a < 0 or b < 0:  # the optimum lies on an edge; its gain there is (column.y)^2 / |.|^2
                a, b = (ty / tt, 0.0) if ty * ty / tt >= xy * xy / xx else (0.0, xy / xx)
        return PrefillCurve(seconds_per_token=a, seconds_per_pair=b, point_count=len(rows))


def _columns(point: PrefillPoint) -> tuple[float, float]:
    pairs = causal_pairs(cached_tokens=point.cached_tokens, new_tokens=point.new_tokens)
    return float(point.new_tokens), float(pairs)


LEARNING_RATE: Final = 1 / 8  # weight of the newest move
STALL_RATIO: Final = 4.0  # a move slower than this times its prediction counts as this


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """One hop between two kinds of memory: ns = latency_ns + size / bytes_per_second.

    `move_count` says how much of it was measured: 0 is a prior.
    """

    bytes_per_second: float
    latency_ns: float
    move_count: int = 0

    @classmethod
    def default(cls, hop: str) -> LinkSpeed:
        """The prior of a hop, named "from->to" as in DEFAULT_LINKS."""
        return DEFAULT_LINKS[hop]

    def move_ns(self, size_bytes: int) -> int:
        """Predicted nanoseconds of one move; 0 for no bytes, LONGEST_NS at most."""
        if size_bytes <= 0:
            return 0
        return round(min(self.latency_ns + size_bytes * NS_PER_SECOND / self.bytes_per_second, LONGEST_NS))

    def observed(self, size_bytes: int, duration_ns: int) -> LinkSpeed:
        """The link after one measured move: an exponentially weighted mean.

        The error is shared between latency and time per byte as they share the prediction, so
        large moves teach the bandwidth, small ones the latency, and both stay positive. A move
        that stalled is cut to STALL_RATIO, lest one hiccup make loading look hopeless.
        """
        if size_bytes <= 0 or duration_ns <= 0:
            return self
        ns_per_byte = NS_PER_SECOND / self.bytes_per_second
        transfer_ns = size_bytes * ns_per_byte
        predicted_ns = self.latency_ns + transfer_ns
        step = LEARNING_RATE * (min(duration_ns / predicted_ns, STALL_RATIO) - 1.0)
        return replace(
            self,
            bytes_per_second=self.bytes_per_second / (1.0 + step * transfer_ns / predicted_ns),
            latency_ns=self.latency_ns * (1.0 + step * self.latency_ns / predicted_ns),
            move_count=self.move_count + 1,
        )


# Priors by hop, conventional figures that no datasheet was checked for: a Gen4 NVMe drive
# and pinned copies over PCIe Gen4 (20 GB/s is also the constant of arXiv 2405.08944).
DEFAULT_LINKS: Final[Mapping[str, LinkSpeed]] = MappingProxyType(
    {
        "nvme->ddr": LinkSpeed(bytes_per_second=7e9, latency_ns=100_000),
        "ddr->nvme": LinkSpeed(bytes_per_second=5e9, latency_ns=100_000),
        "ddr->hbm": LinkSpeed(bytes_per_second=20e9, latency_ns=20_000),
        "hbm->ddr": LinkSpeed(bytes_per_second=20e9, latency_ns=20_000),
    }
)
