"""Rows that need a GPU: a ring of four virtual ranks, the way of pinned DDR to HBM, decode over a million tokens.

Shapes are those of Llama-3-8B: 32 query heads, 8 kv heads, dim 128, bfloat16. Where there is no GPU, the rows are left
out and the reason stands in the report.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import torch
from holdfast.kvstore.clock import SystemClock
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.layout import Layout, Span, contiguous, zigzag
from holdfast.kvstore.spec import KVSpec, LayerGroup, sized
from holdfast.ring_attention.arena import HBMArena
from holdfast.ring_attention.band import DIAGONAL
from holdfast.ring_attention.decode import decode
from holdfast.ring_attention.kernels.kernel import Kernel
from holdfast.ring_attention.kernels.registry import choose_kernel
from holdfast.ring_attention.local import local_group
from holdfast.ring_attention.measure import HbmMeasurement
from holdfast.ring_attention.pass_kv import pass_kv
from holdfast.ring_attention.segment import KVSegment
from holdfast.ring_attention.share import SequenceShare
from ring_case import positions
from rows import Row, row
from torch import Tensor
from virtual_ring import Stage, Transfers, VirtualRank, run_virtual

RANKS: Final = 4
DTYPE: Final = torch.bfloat16
APART: Final = 2e-2
GIB: Final = 1 << 30
SPARE_BYTES: Final = 4 * GIB  # of HBM, for everything but KV
GOALS: Final = {"ring": 0.85, "hidden": 0.9, "reattach": 0.85, "decode": 1.0}


@dataclass(frozen=True)
class GpuSizes:
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    tokens: tuple[int, ...] = (32768, 65536, 131072)
    document_bytes: int = GIB
    decode_tokens: int = 1 << 20
    layers: int = 32
    rounds: int = 7

    def spec(self, layers: int) -> KVSpec:
        """KV of that many of the layers."""
        group = LayerGroup(layers=tuple(range(layers)), kv_heads=self.kv_heads, key_dim=self.dim, value_dim=self.dim)
        return sized(
            KVSpec(groups=(group,), dtype="bfloat16", model="bench", vocabulary_size=256, rope="{}", extent_blocks=1)
        )


def measured() -> tuple[list[Row], str]:
    """Rows and the name of the GPU; or no rows, and why."""
    if not torch.cuda.is_available():
        return [], "rows left out: torch sees no GPU"
    device, sizes = torch.device("cuda"), GpuSizes()
    rows = [*ring_rows(device, sizes), reattach_row(sizes), decode_row(device, sizes)]
    return rows, f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"


def elapsed_ms(work: Callable[[], object]) -> float:
    """On the computing stream, from its first kernel to its last, gaps included."""
    torch.cuda.synchronize()
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return float(begun.elapsed_time(ended))


# The ring ------------------------------------------------------------------------------------------


class Ring:
    """A document of `tokens` in zigzag over virtual ranks, and the same in one piece."""

    def __init__(self, device: torch.device, sizes: GpuSizes, tokens: int, dtype: torch.dtype) -> None:
        maker = torch.Generator(device).manual_seed(tokens)

        def noise(heads: int) -> Tensor:
            return torch.randn(heads, tokens, sizes.dim, generator=maker, device=device, dtype=dtype)

        self.device = device
        self.kernel: Kernel = choose_kernel(device, dtype)
        self.query, self.key, self.value = noise(sizes.heads), noise(sizes.kv_heads), noise(sizes.kv_heads)
        self.layout: Layout = zigzag(tokens, RANKS)
        self.spans = [self.layout.spans(rank) for rank in range(RANKS)]
        self.rows = [positions(spans).to(device) for spans in self.spans]
        self.queries = [self.query[:, rows].contiguous() for rows in self.rows]
        held = [[spans] for spans in self.spans]
        segments = [
            KVSegment(self.key[:, rows].contiguous(), self.value[:, rows].contiguous(), spans)
            for rows, spans in zip(self.rows, self.spans, strict=True)
        ]
        self.shares = [SequenceShare(self.spans, [segment], held) for segment in segments]
        grouped = 1 if self.kernel.capabilities.gqa else sizes.heads // sizes.kv_heads
        # What the kernel wants of the dense side is made before it is timed.
        self.whole = [part.repeat_interleave(grouped, 0) for part in (self.key, self.value)]

    def dense(self) -> Tensor:
        """One call of the kernel."""
        return self.kernel.call(self.query, *self.whole, DIAGONAL, self.query.shape[2] ** -0.5)[0]

    def ring(self, stage: Stage) -> list[Tensor]:
        def attend(rank: VirtualRank) -> Tensor:
            return pass_kv(rank, self.kernel, self.queries[rank.rank], [self.shares[rank.rank]], None)

        return run_virtual(RANKS, stage, attend)

    def apart(self) -> float:
        """How far the ring's output is from the dense one, at worst."""
        dense = self.dense().float()
        outs = self.ring(Stage(self.device, Transfers.COPIED))
        return max(float((out - dense[:, rows]).abs().max()) for out, rows in zip(outs, self.rows, strict=True))


@torch.inference_mode()
def ring_rows(device: torch.device, sizes: GpuSizes) -> list[Row]:
    """The worst of all lengths counts."""
    ratios, shares = [], []
    raw: dict[str, float] = {"rounds": float(sizes.rounds)}
    hidden_raw: dict[str, float] = {"rounds": float(sizes.rounds)}
    for tokens in sizes.tokens:
        ring = Ring(device, sizes, tokens, DTYPE)
        apart = ring.apart()
        assert apart <= APART, f"{tokens} tokens: the ring is {apart} from dense"
        times: dict[str, list[float]] = {"dense": [], "ring": [], "alone": [], "copy": [], "exposed": [], "events": []}
        for _ in range(sizes.rounds):
            copied, left_out = Stage(device, Transfers.COPIED), Stage(device, Transfers.LEFT_OUT)
            times["dense"].append(elapsed_ms(ring.dense))
            times["ring"].append(elapsed_ms(lambda: ring.ring(copied)))  # noqa: B023
            times["alone"].append(elapsed_ms(lambda: ring.ring(left_out)))  # noqa: B023
            times["copy"].append(copied.copy_ms())
            times["exposed"].append(copied.exposed_ms())
            times["events"].append(left_out.exposed_ms())
        ms = {name: median(some) for name, some in times.items()}
        ratios.append(ms["dense"] / ms["ring"])
        shares.append(1 - max(0.0, ms["exposed"] - ms["events"]) / ms["copy"])
        raw |= {f"{tokens // 1024}k_{name}_ms": ms[name] for name in ("dense", "ring", "alone")}
        raw |= {f"{tokens // 1024}k_ratio": ratios[-1], f"{tokens // 1024}k_apart": apart}
        hidden_raw |= {f"{tokens // 1024}k_{name}_ms": ms[name] for name in ("copy", "exposed", "events")}
        hidden_raw[f"{tokens // 1024}k_share"] = shares[-1]
    return [
        row("gpu_ring_n4_vs_dense", min(ratios), GOALS["ring"], "higher", raw),
        row("gpu_hidden_transfer_share", min(shares), GOALS["hidden"], "higher", hidden_raw),
    ]


# From DDR, and decode ------------------------------------------------------------------------------


def reattach_row(sizes: GpuSizes) -> Row:
    """Extents from a pinned slab into an arena, over one copy of as many bytes from the same kind of memory."""
    spec = sizes.spec(sizes.layers)
    size = extent_geometry(spec).size_bytes
    count = max(1, sizes.document_bytes // size)
    slab = memoryview(mmap.mmap(-1, count * size))  # pinned from its first use until this process ends
    parts = [slab[i * size : (i + 1) * size] for i in range(count)]
    host = torch.zeros(count * size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device="cuda")
    measurement = HbmMeasurement(spec, parts, "cuda", SystemClock())
    measurement.load()  # pins the slab
    ours, bare = [], []
    for _ in range(sizes.rounds):
        bare.append(elapsed_ms(lambda: there.copy_(host, non_blocking=True)))
        ours.append(measurement.load() / 1e6)
    raw = {
        "ours_ms": median(ours),
        "bare_ms": median(bare),
        "ratio_min": min(bare) / max(ours),
        "ratio_max": max(bare) / min(ours),
        "bare_gb_per_s": count * size / median(bare) / 1e6,
        "rounds": float(sizes.rounds),
    }
    return row("gpu_reattach_vs_h2d", median(bare) / median(ours), GOALS["reattach"], "higher", raw)


@torch.inference_mode()
def decode_row(device: torch.device, sizes: GpuSizes) -> Row:
    """One token over a million, through all layers whose KV fits: the HBM that all layers need over what there is."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    layer_bytes = sizes.decode_tokens * 2 * sizes.kv_heads * sizes.dim * DTYPE.itemsize
    layers = max(1, min(sizes.layers, (free - SPARE_BYTES) // layer_bytes))
    arena = HBMArena(sizes.spec(layers), sizes.decode_tokens, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kernel, [communicator] = choose_kernel(device, DTYPE), local_group(1)
    query = torch.randn(sizes.heads, 1, sizes.dim, device=device, dtype=DTYPE)
    spans = contiguous(sizes.decode_tokens, 1).spans(0)
    asked = [(Span(sizes.decode_tokens - 1, sizes.decode_tokens),)]

    def step() -> None:
        for layer in range(layers):
            share = SequenceShare(asked, [arena.segment(layer, 0, spans)], [[spans]])
            decode(communicator, kernel, query, [share], None)

    step()
    times = [elapsed_ms(step) for _ in range(sizes.rounds)]
    beside = torch.cuda.max_memory_allocated(device) - before
    raw: dict[str, Any] = {
        "layers": float(layers),
        "layers_wanted": float(sizes.layers),
        "ours_ms": median(times),
        "gb_per_s": layers * layer_bytes / median(times) / 1e6,
        "kv_gib": sizes.layers * layer_bytes / GIB,
        "beside_kv_gib": beside / GIB,
        "hbm_gib": total / GIB,
        "rounds": float(sizes.rounds),
    }
    needed = (sizes.layers * layer_bytes + beside) / total
    return row("gpu_decode_1m_tokens_hbm_share", needed, GOALS["decode"], "lower", raw, also=layers == sizes.layers)
