"""The ring's side: one rank, in a process of its own, with one thread. All are told the same, in the same order."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from holdfast.kvstore.clock import SystemClock
from holdfast.kvstore.layout import zigzag
from holdfast.ring_attention.arena import HBMArena
from holdfast.ring_attention.choice import AttentionShape, ChoiceModel
from holdfast.ring_attention.communicator import Communicator
from holdfast.ring_attention.decode import decode
from holdfast.ring_attention.join import join
from holdfast.ring_attention.kernels.registry import choose_kernel
from holdfast.ring_attention.ring_measure import measure_ring
from holdfast.ring_attention.segment import shifted
from holdfast.ring_attention.share import SequenceShare
from holdfast.ring_attention.strategies import STRATEGIES
from ring_case import CHOSEN, DIM, GLOO, HEADS, KV_HEADS, Case, Share, inputs, share, spec
from ring_dense import OP
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as template

CPU: Final = torch.device("cpu")
DEADLINE_SECONDS: Final = 60.0
DECISIONS: Final = 100


class Rank:
    """Cases by name, as this rank holds them, and one communicator of each kind."""

    def __init__(self, rank: int, communicators: dict[str, Communicator]) -> None:
        torch.set_num_threads(1)
        self.rank = rank
        self.communicators = communicators
        self.size = communicators[CHOSEN].size
        self.kernel = choose_kernel(CPU, torch.float32)
        self.cases: dict[str, Case] = {}
        self.shares: dict[str, Share] = {}
        shape = AttentionShape(
            heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, value_dim=DIM, element_bytes=4, cp=self.size
        )
        self.choice = ChoiceModel(shape)

    def describe(self) -> dict[str, Any]:
        """What the product chooses on this machine."""
        return {"communicator": self.communicators[CHOSEN].name, "kernel": self.kernel.name, "torch": torch.__version__}

    def load(self, case: dict[str, Any]) -> dict[str, Any]:
        one = Case.of(case)
        self.cases[one.name], self.shares[one.name] = one, share(one, self.rank, self.size)
        return {}

    def forget(self) -> dict[str, Any]:
        self.cases.clear()
        self.shares.clear()
        return {}

    def work(self, name: str, how: str, over: str) -> Callable[[], Tensor]:
        mine, communicator = self.shares[name], self.communicators[over]
        if how.startswith("template"):
            return self.template(name, how)
        if how == "auto":
            return lambda: STRATEGIES[self.decision(name)](communicator, self.kernel, mine.query, mine.batch, None)
        run = decode if how == "decode" else STRATEGIES[how]
        return lambda: run(communicator, self.kernel, mine.query, mine.batch, None)

    def template(self, name: str, how: str) -> Callable[[], Tensor]:
        """Torch's ring over gloo with the same kernel; its halves are our zigzag's."""
        query, key, value = inputs(self.cases[name], 0)
        rows = self.shares[name].rows
        mine = [part[None, :, rows].contiguous() for part in (query, key, value)]
        group = dist.distributed_c10d._get_default_group()  # noqa: SLF001
        rotation = how.removeprefix("template_")

        def attend() -> Tensor:
            template.set_rotate_method(rotation)
            out: Tensor = template._templated_ring_attention(group, 2, OP, *mine, is_causal=True)[0]  # noqa: SLF001
            return out[0]

        return attend

    def calibrate(self, over: str) -> dict[str, Any]:
        """Measure with the product's own code what `auto` decides by."""
        communicator, shape = self.communicators[over], self.choice.shape
        speed = measure_ring(communicator, self.kernel, shape, torch.float32, CPU, SystemClock())
        self.choice = ChoiceModel(self.choice.shape, speed)
        return asdict(speed)

    def decision(self, name: str) -> str:
        one = self.cases[name]
        document = zigzag(one.cached, self.size)
        cached = [[document.length(rank) for rank in range(self.size)]]
        return self.choice.decide([(one.new, one.cached)], cached).strategy

    def decide(self, name: str) -> dict[str, Any]:
        """What `auto` takes, and seconds of deciding."""
        started = time.perf_counter()
        for _ in range(DECISIONS):
            strategy = self.decision(name)
        return {"strategy": strategy, "seconds": (time.perf_counter() - started) / DECISIONS}

    @torch.inference_mode()
    def run(self, name: str, how: str, over: str, times: int) -> dict[str, Any]:
        """Seconds on the clock that all processes share, and of CPU, of all threads of this process."""
        work = self.work(name, how, over)
        self.communicators[over].barrier()
        cpu, started = time.process_time(), time.perf_counter()
        for _ in range(times):
            work()
        ended = time.perf_counter()
        return {"started": started, "ended": ended, "cpu": time.process_time() - cpu}

    @torch.inference_mode()
    def check(self, name: str, how: str, over: str, path: str) -> dict[str, Any]:
        """How far this rank's output is from the dense one's, at worst."""
        dense = torch.load(path, mmap=True)[:, self.shares[name].rows]
        return {"apart": float((self.work(name, how, over)() - dense).abs().max()) if dense.numel() else 0.0}

    def transfer(self, over: str, size_bytes: int, times: int) -> dict[str, Any]:
        """Both ways at once: to the next rank, from the one before."""
        send = torch.full((size_bytes,), self.rank, dtype=torch.uint8)
        receive = torch.empty_like(send)
        communicator = self.communicators[over]
        communicator.shift(send, receive).wait()
        assert bool((receive == (self.rank - 1) % self.size).all()), "the other rank's bytes"
        communicator.barrier()
        cpu, started = time.process_time(), time.perf_counter()
        for _ in range(times):
            communicator.shift(send, receive).wait()
        ended = time.perf_counter()
        return {"started": started, "ended": ended, "cpu": time.process_time() - cpu}

    @torch.inference_mode()
    def memory(self, cached: int, new: int, layers: int, over: str) -> dict[str, Any]:
        """A document's KV of all layers in an arena, attended once by pass-KV: bytes of KV, and the process's peak."""
        with suppress(OSError):  # without it the peak is that of shorter documents too, which is lower
            Path("/proc/self/clear_refs").write_text("5")
        document, fresh = zigzag(cached, self.size), zigzag(new, self.size)
        arenas = [HBMArena(spec(layers), layout.length(self.rank)) for layout in (document, fresh)]
        for arena in arenas:
            arena.key.fill_(0.5)
            arena.value.fill_(0.5)
        asked = [shifted(fresh.spans(peer), cached) for peer in range(self.size)]
        held = [[document.spans(peer), asked[peer]] for peer in range(self.size)]
        query = torch.ones(HEADS, fresh.length(self.rank), DIM)
        for layer in range(layers):
            segments = [a.segment(layer, 0, spans) for a, spans in zip(arenas, held[self.rank], strict=True)]
            batch = [SequenceShare(asked, segments, held)]
            STRATEGIES["pass_kv"](self.communicators[over], self.kernel, query, batch, None)
        return {"kv_bytes": arenas[0].key.nbytes + arenas[0].value.nbytes, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [kib] = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return kib * 1024


def joined(rank: int, size: int, directory: str) -> Rank:
    """A rank of a new group, with the communicator that the product chooses on this machine, and with gloo."""
    chosen = join("auto", rank, size, f"file://{directory}/chosen", CPU, DEADLINE_SECONDS)
    gloo = (
        chosen if chosen.name == "gloo" else join("gloo", rank, size, f"file://{directory}/gloo", CPU, DEADLINE_SECONDS)
    )
    return Rank(rank, {CHOSEN: chosen, GLOO: gloo})
