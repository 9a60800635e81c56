"""Choice: which of the exact strategies exposes less communication, pass-KV or pass-Q. Pure arithmetic, no tensors.

First the rules of arXiv 2411.01783 in its own symbols: N ranks (`ranks`), C FLOP/s of one rank (`flops_per_second`), BW
bytes/s of its link (`bytes_per_second`), e bytes an element (`element_bytes`), NH and NKV heads (`heads`, `kv_heads`),
D = NH * head dim (`model_dim`), T new and P cached tokens. Then `decide`, which `auto` uses: Algorithm 5's comparison
with what was measured in the group instead of the paper's constants, and with the bytes that are really sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log
from typing import Final

from ..kvstore.calibration import RingSpeed
from ..kvstore.costs import causal_pairs
from .pass_q import OWN_ROWS

PASS_KV: Final = "pass_kv"  # noqa: S105 - no password
PASS_Q: Final = "pass_q"  # noqa: S105 - no password
LOCAL: Final = "local"  # one rank: nothing goes round

# One sequence of a batch: (T new tokens, P cached tokens).
Sequences = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperSetting:
    """What the paper's rules are about; see the module for the symbols."""

    ranks: int
    flops_per_second: float
    bytes_per_second: float
    element_bytes: int
    heads: int
    kv_heads: int

    def eq2_new_tokens(self) -> float:
        """Equation 2: from T = N C NKV e / (2 NH BW) on, pass-KV's transfers are hidden; P does not matter."""
        work = self.ranks * self.flops_per_second * self.kv_heads * self.element_bytes
        return work / (2 * self.heads * self.bytes_per_second)

    def eq3_tokens(self) -> float:
        """Equation 3: from T + P = N e C / (4 BW) on, pass-Q's ring transfers are hidden; its All2All never is."""
        return self.ranks * self.element_bytes * self.flops_per_second / (4 * self.bytes_per_second)

    def eq5_all2all_seconds(self, new_tokens: int, model_dim: int) -> float:
        """Equation 5: (N - 1) (D + 1) T e / BW."""
        return (self.ranks - 1) * (model_dim + 1) * new_tokens * self.element_bytes / self.bytes_per_second


def algorithm1(setting: PaperSetting, new_tokens: int, cached_tokens: int) -> str:
    """Algorithm 1: pass-KV if its transfers are hidden (equation 2) or it sends fewer bytes (equation 1)."""
    miss_ratio = new_tokens / (new_tokens + cached_tokens)
    parity = 2 * setting.kv_heads / setting.heads
    return PASS_KV if new_tokens >= setting.eq2_new_tokens() or miss_ratio >= parity else PASS_Q


def algorithm5(setting: PaperSetting, new_tokens: int, cached_tokens: int) -> str:
    """Algorithm 5 (appendix C): algorithm 1 with the All2All counted against pass-Q."""
    miss_ratio = new_tokens / (new_tokens + cached_tokens)
    parity = 2 * setting.kv_heads / setting.heads
    work = setting.ranks * setting.flops_per_second * setting.element_bytes
    all2all = 4 * new_tokens * setting.bytes_per_second / work
    return PASS_KV if new_tokens >= setting.eq2_new_tokens() or miss_ratio >= parity - all2all else PASS_Q


def empirical(new_tokens: int, cached_tokens: int, a: float, b: float, c: float) -> float:
    """Appendix D: h = a ln T + b ln(T / (T + P)) + c; above 0 it speaks for pass-KV.

    The published coefficients get 4 of the 14 rows of the paper's own table 4 right: fit them (`fit_empirical`).
    """
    return a * log(new_tokens) + b * log(new_tokens / (new_tokens + cached_tokens)) + c


def fit_empirical(points: Sequence[tuple[int, int, float]]) -> tuple[float, float, float]:
    """(a, b, c) by least squares. A point is (T, P, gain), gain = ln(pass-Q seconds / pass-KV seconds).

    At least three points that differ in T and in T / (T + P) are needed. A touch of ridge keeps the solution finite
    where they hardly differ: measured along one P + T, ln T and ln(T / (T + P)) move together.
    """
    rows = [(log(new), log(new / (new + cached)), 1.0) for new, cached, _ in points]
    ridge = 1e-9 * sum(x * x for row in rows for x in row)
    matrix = [[sum(r[i] * r[j] for r in rows) + (ridge if i == j else 0.0) for j in range(3)] for i in range(3)]
    right = [sum(r[i] * gain for r, (_, _, gain) in zip(rows, points, strict=True)) for i in range(3)]
    whole = _determinant(matrix)
    a, b, c = (_determinant([[*m[:i], y, *m[i + 1 :]] for m, y in zip(matrix, right, strict=True)]) for i in range(3))
    return a / whole, b / whole, c / whole


def _determinant(m: Sequence[Sequence[float]]) -> float:
    minors = (m[1][1] * m[2][2] - m[1][2] * m[2][1], m[1][2] * m[2][0] - m[1][0] * m[2][2])
    return m[0][0] * minors[0] + m[0][1] * minors[1] + m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0])


# What `auto` uses ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """One layer's attention as one rank of `cp` computes it: the heads are a tensor-parallel rank's own.

    `windows` are those of all layers, which take the same strategy: None sees everything.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    element_bytes: int
    cp: int
    windows: tuple[int | None, ...] = (None,)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's K and V."""
        return self.kv_heads * (self.head_dim + self.value_dim) * self.element_bytes

    @property
    def query_token_bytes(self) -> int:
        """Bytes of one token's queries."""
        return self.heads * self.head_dim * self.element_bytes

    @property
    def partial_token_bytes(self) -> int:
        """Bytes of one token's partial result as pass-Q sends it: out in half precision or float32, lse in float32."""
        return self.heads * (self.value_dim * (2 if self.element_bytes == 2 else 4) + 4)

    @property
    def filling_tokens(self) -> int:
        """New tokens of a sequence from which on each rank's own queries fill kernel calls."""
        return self.cp * ceil(OWN_ROWS * self.kv_heads / self.heads)

    @property
    def pair_flops(self) -> int:
        """FLOPs of one query token and one key token: 2 H (D + Dv)."""
        return 2 * self.heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A strategy, why in one line, and what either would make the ranks wait in a layer, predicted, in the mean.

    Seconds beyond what the computing takes where it is shared evenly: transfers that it does not hide, KV that is read
    more than once, and waiting for a rank that has more to do. They are 0 for one rank, and None where nothing was
    measured and bytes alone decided.
    """

    strategy: str
    reason: str
    pass_kv_seconds: float | None
    pass_q_seconds: float | None


@dataclass(frozen=True, slots=True)
class ChoiceModel:
    """A group's choice: its shape, and its speed where that was measured."""

    shape: AttentionShape
    speed: RingSpeed | None = None

    def decide(self, sequences: Sequences, cached: Sequence[Sequence[int]] | None = None) -> Decision:
        """See `decide`."""
        return decide(self.shape, self.speed, sequences, cached)


def decide(
    shape: AttentionShape,
    speed: RingSpeed | None,
    sequences: Sequences,
    cached: Sequence[Sequence[int]] | None = None,
) -> Decision:
    """The strategy that exposes less; a tie goes to pass-KV. Equal arguments give equal answers: all ranks agree.

    `cached[i][r]` are the cached tokens of sequence i whose KV is on rank r, by default even shares; new tokens are
    dealt evenly. With `speed` None the strategy that sends fewer bytes is chosen. More new tokens never turn pass-KV
    into pass-Q as long as an exchanged byte costs no less than a shifted one.
    """
    assert all(new >= 0 and before >= 0 for new, before in sequences), sequences
    if shape.cp == 1:
        return Decision(strategy=LOCAL, reason="local: cp=1", pass_kv_seconds=0.0, pass_q_seconds=0.0)
    shares: Sequence[Sequence[float]] = cached or _even(shape, sequences)
    windows = Counter(shape.windows)
    layers = [(_Load.of(shape, sequences, shares, window), count) for window, count in windows.items()]
    case = f"T={sum(new for new, _ in sequences)}, P={sum(before for _, before in sequences)}, cp={shape.cp}"
    if len(sequences) != 1:
        case = f"{len(sequences)} sequences, {case}"
    if speed is None:
        kv = _mean([((shape.cp - 1) * load.kv_bytes, count) for load, count in layers])
        q = _mean([(load.query_bytes + load.partial_bytes, count) for load, count in layers])
        strategy, (less, more) = _smaller(kv, q)
        reason = f"{strategy}: sends {less / 1e6:.3g} MB a layer, {_other(strategy)} {more / 1e6:.3g} MB"
        return Decision(
            strategy=strategy, reason=f"{reason} (not calibrated; {case})", pass_kv_seconds=None, pass_q_seconds=None
        )
    kv_seconds = _mean([(load.pass_kv_seconds(speed), count) for load, count in layers])
    q_seconds = _mean(
        [
            (load.pass_q_seconds(speed, _beside_exchange(shape, speed, sequences, window)), count)
            for (load, count), window in zip(layers, windows, strict=True)
        ]
    )
    strategy, (less, more) = _smaller(kv_seconds, q_seconds)
    reason = f"{strategy}: exposes {less * 1e3:.3g} ms a layer, {_other(strategy)} {more * 1e3:.3g} ms ({case})"
    return Decision(strategy=strategy, reason=reason, pass_kv_seconds=kv_seconds, pass_q_seconds=q_seconds)


def pass_kv_from(shape: AttentionShape, speed: RingSpeed, cached_tokens: int) -> int | None:
    """The fewest new tokens from which on one sequence takes pass-KV; None when it does not up to as many as cached."""

    def takes(new_tokens: int) -> bool:
        return decide(shape, speed, [(new_tokens, cached_tokens)]).strategy == PASS_KV

    low, high = 1, max(1, cached_tokens)
    if not takes(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if takes(middle) else (middle + 1, high)
    return low


def _beside_exchange(shape: AttentionShape, speed: RingSpeed, sequences: Sequences, window: int | None) -> float:
    """Seconds that a rank's own queries are computed beside the exchange of pass-Q, if cached tokens lie evenly.

    What they take beyond queries that just fill kernel calls, and no more than they would beside a hop of pass-KV: so
    more new tokens take no more off pass-Q than off pass-KV.
    """
    filling = [(min(new, shape.filling_tokens), before) for new, before in sequences]
    if not speed.overlap or filling == list(sequences):  # deciding takes half as long
        return 0.0
    more, less = (_Load.of(shape, some, _even(shape, some), window).beside_hop(speed) for some in (sequences, filling))
    return more - less


def _even(shape: AttentionShape, sequences: Sequences) -> list[list[float]]:
    return [[before / shape.cp] * shape.cp for _, before in sequences]


def _mean(layers: Sequence[tuple[float, int]]) -> float:
    return sum(value * count for value, count in layers) / sum(count for _, count in layers)


def _smaller(kv: float, q: float) -> tuple[str, tuple[float, float]]:
    return (PASS_KV, (kv, q)) if kv <= q else (PASS_Q, (q, kv))


def _other(strategy: str) -> str:
    return PASS_Q if strategy == PASS_KV else PASS_KV


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """What one layer of a call sends and computes.

    `kv_bytes` is the largest message of a hop; `query_bytes` and `partial_bytes` are what the rank with most queries
    sends, and gets home. `pairs[r]` are query-key pairs whose keys rank r holds, `cached_bytes[r]` the cached KV there.
    """

    cp: int
    kv_bytes: float
    query_bytes: float
    partial_bytes: float
    pair_flops: int
    pairs: Sequence[float]
    cached_bytes: Sequence[float]

    @classmethod
    def of(
        cls, shape: AttentionShape, sequences: Sequences, cached: Sequence[Sequence[float]], window: int | None
    ) -> _Load:
        """Add the sequences up. What lies in the window is taken to lie on the ranks as all of it does."""
        largest = sum(ceil(new / shape.cp) for new, _ in sequences)
        before, pairs = [0.0] * shape.cp, [0.0] * shape.cp
        for (new, tokens), shares in zip(sequences, cached, strict=True):
            seen = causal_pairs(cached_tokens=tokens, new_tokens=new, window=window)
            fresh = causal_pairs(cached_tokens=0, new_tokens=new, window=window)
            reach = 1.0 if window is None or tokens < window else (window - 1) / tokens
            for rank, share in enumerate(shares):
                before[rank] += reach * share
                pairs[rank] += fresh / shape.cp + ((seen - fresh) * share / tokens if tokens else 0.0)
        return cls(
            cp=shape.cp,
            kv_bytes=(max(before) + largest) * shape.kv_token_bytes,
            query_bytes=(shape.cp - 1) * largest * shape.query_token_bytes,
            partial_bytes=(shape.cp - 1) * largest * shape.partial_token_bytes,
            pair_flops=shape.pair_flops,
            pairs=pairs,
            cached_bytes=[tokens * shape.kv_token_bytes for tokens in before],
        )

    def pass_kv_seconds(self, speed: RingSpeed) -> float:
        """Packing the message, and of each hop's transfer what computing does not hide.

        Every rank meets every shard with its share of the queries: uneven shards cost no waiting, but all KV is read.
        """
        computing = sum(self._calls(speed, self.cp))
        hops = (self.cp - 1) * speed.exposed_seconds(self.kv_bytes, computing / self.cp)
        return self.kv_bytes / speed.copy_bytes_per_second + hops + self._beyond(computing, speed)

    def pass_q_seconds(self, speed: RingSpeed, beside_seconds: float) -> float:
        """Packing and exchanging queries, then partial results, and waiting for the rank with most keys.

        Every rank reads its own KV only, once for all queries. The first exchange has computing of `beside_seconds`
        beside it.
        """
        packing = (self.query_bytes + self.partial_bytes) / speed.copy_bytes_per_second
        queries, partials = (speed.exchange_seconds(size) for size in (self.query_bytes, self.partial_bytes))
        exposed = packing + queries - speed.overlap * min(queries, beside_seconds) + partials
        return exposed + self._beyond(max(self._calls(speed, 1)), speed)

    def beside_hop(self, speed: RingSpeed) -> float:
        """Seconds that computing and a hop of pass-KV go on beside each other."""
        return min(speed.shift_seconds(self.kv_bytes), sum(self._calls(speed, self.cp)) / self.cp)

    def _calls(self, speed: RingSpeed, share: int) -> list[float]:
        """Seconds that one of `share` parts of the queries takes over each rank's keys: computing or reading bounds it.

        Reading new tokens' KV is not counted, because they come with queries of their own.
        """
        return [
            max(pairs / share * self.pair_flops / speed.flops_per_second, size / speed.key_bytes_per_second)
            for pairs, size in zip(self.pairs, self.cached_bytes, strict=True)
        ]

    def _beyond(self, computing_seconds: float, speed: RingSpeed) -> float:
        """What is above the least that any strategy takes on some rank; never negative, for sums are rounded."""
        flops = sum(self.pairs) * self.pair_flops
        least = max(flops / speed.flops_per_second, sum(self.cached_bytes) / speed.key_bytes_per_second) / self.cp
        return max(0.0, computing_seconds - least)
