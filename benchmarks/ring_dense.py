"""The dense side: attention without ranks in one process with as many threads as there are ranks, and its float64 self.

It is given every advantage that the ring has: the same kernel, cached keys without a mask, new ones as a causal square,
GQA groups folded into the queries where that is quicker, KV in one piece. The quickest variant is the baseline.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import torch
from holdfast.ring_attention.attend import attend
from holdfast.ring_attention.band import FULL
from holdfast.ring_attention.decode import decode
from holdfast.ring_attention.kernels.registry import choose_kernel
from holdfast.ring_attention.local import local_group
from holdfast.ring_attention.merge import merge
from holdfast.ring_attention.strategies import STRATEGIES
from ring_case import DIM, HEADS, KV_HEADS, Case, Share, inputs, share
from torch import Tensor

MOST_TRIES: Final = 5
TRYING_SECONDS: Final = 1.0
ERROR_SEEDS: Final = 8
ERROR_QUERIES: Final = 128
OP: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
Part = tuple[Tensor, Tensor]  # out [B, H, T, D], lse [B, H, T]


def call(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Part:
    out, lse = OP(query, key, value, 0.0, causal)
    return out, lse


def folded(query: Tensor, key: Tensor, value: Tensor) -> Part:
    """The heads of a GQA group as further queries of their kv head: each key is read once."""
    batch, heads, tokens, dim = query.shape
    out, lse = call(query.reshape(batch, key.shape[1], -1, dim), key, value)
    return out.reshape(batch, heads, tokens, dim), lse.reshape(batch, heads, tokens)


def joined(a: Part, b: Part) -> Tensor:
    """Out of two parts over disjoint keys."""
    weight = torch.sigmoid(b[1] - a[1]).unsqueeze(-1)
    return torch.lerp(a[0], b[0], weight)


class Dense:
    """`batches`: by case, sequences stacked: query [B, H, T, D], key and value [B, Hkv, P + T, D]."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.threads = threads
        self.kernel = choose_kernel(torch.device("cpu"), torch.float32)
        self.cases: dict[str, Case] = {}
        self.batches: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.alone: dict[str, Share] = {}

    def load(self, case: dict[str, Any]) -> dict[str, Any]:
        one = Case.of(case)
        parts = zip(*[inputs(one, number) for number in range(one.sequences)], strict=True)
        self.cases[one.name] = one
        query, key, value = (torch.stack(part) for part in parts)
        self.batches[one.name] = (query, key, value)
        self.alone[one.name] = share(one, 0, 1)
        return {}

    def forget(self) -> dict[str, Any]:
        for kept in (self.cases, self.batches, self.alone):
            kept.clear()
        return {}

    def variants(self, name: str) -> dict[str, Callable[[], Tensor]]:
        """Ways to compute [B, H, T, D]. `own`: the product as a group of one rank."""
        case, (query, key, value) = self.cases[name], self.batches[name]
        before = [part[:, :, : case.cached] for part in (key, value)]
        behind = [part[:, :, case.cached :] for part in (key, value)]

        def both(over: Callable[[Tensor, Tensor, Tensor], Part]) -> Tensor:
            if case.decodes:
                return over(query, key, value)[0]
            square = call(query, behind[0], behind[1], causal=True)
            return joined(over(query, before[0], before[1]), square) if case.cached else square[0]

        def each() -> Tensor:
            """One call a sequence."""
            return torch.cat([folded(*(part[i : i + 1] for part in (query, key, value)))[0] for i in range(len(query))])

        ways = {"plain": lambda: both(call), "own": lambda: self.own(name)}
        if case.cached:
            ways["folded"] = lambda: both(folded)
        if case.decodes and case.sequences > 1:
            ways["folded_each"] = each
        return ways

    def own(self, name: str) -> Tensor:
        case, mine = self.cases[name], self.alone[name]
        run = decode if case.decodes else STRATEGIES["pass_kv"]
        out = run(local_group(1)[0], self.kernel, mine.query, mine.batch, None)
        return out.unflatten(1, (case.sequences, -1)).transpose(0, 1)

    @torch.inference_mode()
    def best(self, name: str) -> dict[str, Any]:
        """The quickest variant, seconds of all, and how far apart their results are."""
        seconds: dict[str, float] = {}
        outs: list[Tensor] = []
        for variant, work in self.variants(name).items():
            outs.append(work())
            tries = [self._timed(work, 1)["seconds"]]
            while len(tries) < MOST_TRIES and sum(tries) < TRYING_SECONDS:
                tries.append(self._timed(work, 1)["seconds"])
            seconds[variant] = min(tries)
        worst = max(float((out - outs[0]).abs().max()) for out in outs)
        return {"best": min(seconds, key=seconds.__getitem__), "seconds": seconds, "apart": worst}

    @torch.inference_mode()
    def keep(self, name: str, variant: str, path: str) -> dict[str, Any]:
        """Write the output as [H, B * T, D], to compare with."""
        torch.save(self.variants(name)[variant]().transpose(0, 1).flatten(1, 2).contiguous(), path)
        return {}

    @torch.inference_mode()
    def run(self, name: str, variant: str, times: int) -> dict[str, Any]:
        return self._timed(self.variants(name)[variant], times)

    def _timed(self, work: Callable[[], Tensor], times: int) -> dict[str, Any]:
        cpu, started = time.process_time(), time.perf_counter()
        for _ in range(times):
            work()
        ended = time.perf_counter()
        return {"started": started, "ended": ended, "seconds": ended - started, "cpu": time.process_time() - cpu}

    @torch.inference_mode()
    def merge_error(self, keys: int, parts: int) -> dict[str, Any]:
        """Errors against the same operator in float64, of random queries: norm of the difference over the norm."""
        errors: dict[str, list[float]] = {"kernel": [], "merged": []}
        worst = dict.fromkeys(errors, 0.0)
        for seed in range(ERROR_SEEDS):
            maker = torch.Generator().manual_seed(seed)
            query = torch.randn(HEADS, ERROR_QUERIES, DIM, generator=maker)
            key, value = torch.randn(2, KV_HEADS, keys, DIM, generator=maker)
            exact = call(*(part[None].double() for part in (query, key, value)))[0][0]
            cut = zip(key.chunk(parts, 1), value.chunk(parts, 1), strict=True)
            merged = merge([attend(self.kernel, query, *some, FULL) for some in cut])
            whole = attend(self.kernel, query, key, value, FULL)
            for name, part in (("kernel", whole), ("merged", merged)):
                apart = part.out.double() - exact
                errors[name].append(float(apart.norm() / exact.norm()))
                worst[name] = max(worst[name], float(apart.abs().max()))
        means = {name: sum(some) / ERROR_SEEDS for name, some in errors.items()}
        return means | {f"{name}_max": value for name, value in worst.items()} | {"rounds": ERROR_SEEDS}
