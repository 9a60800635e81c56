"""Group measure: what a group is, and what it was measured to do, from its runners. All ranks call the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch

from ..kvstore.calibration import RingRate, RingSetting
from ..kvstore.clock import Clock
from ..kvstore.costs import PrefillPoint
from .choice import ChoiceModel, pass_kv_from
from .device import described
from .ring_measure import measure_ring, shared
from .runner import ContextParallelRunner
from .shard import KVShard

CACHED_TOKENS: Final = (32 << 10, 128 << 10)  # where people are told from how many new tokens on pass-KV is taken
PREFILL_TOKENS: Final = (256, 512, 1024, 2048, 4096, 8192)
PREFILL_BYTES: Final = 256 << 20  # of a rank's private memory
QUADRATIC: Final = 4  # twice the tokens take at most four times as long
SEED: Final = 0


def setting_of(runner: ContextParallelRunner, machine: str) -> RingSetting:
    """What the speed of the runner's group depends on; `machine` describes the hardware."""
    shape = runner.choice.shape
    return RingSetting(
        machine=machine,
        device=described(runner.model.device),
        communicator=runner.group.name,
        kernel=runner.kernel.name,
        cp=shape.cp,
        tp=runner.model.tp,
        dtype=runner.model.config.dtype,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
    )


def measure_rate(runner: ContextParallelRunner, setting: RingSetting, clock: Clock) -> RingRate:
    """Measure the group; all ranks get the same speed, for tensor-parallel ranks that of the first. Raises GroupFailed.

    For groups of at least two context-parallel ranks. Thresholds are those of layers that see everything.
    """
    device, shape = runner.model.device, replace(runner.choice.shape, windows=(None,))
    dtype: torch.dtype = getattr(torch, runner.model.config.dtype)
    own = measure_ring(runner.grid.cp, runner.kernel, shape, dtype, device, clock)
    speed = shared(runner.group, own, device)
    assert speed is not None, "rank 0 has measured"
    thresholds = tuple((tokens, pass_kv_from(shape, speed, tokens)) for tokens in CACHED_TOKENS)
    return RingRate(setting=setting, speed=speed, measured_wall_ns=clock.wall_ns(), pass_kv_from=thresholds)


def choose_by(runner: ContextParallelRunner, known: RingRate | None) -> bool:
    """Decide by what rank 0 knows of the group, if it does: whether that is so. Raises GroupFailed."""
    speed = shared(runner.group, known.speed if known is not None else None, runner.model.device)
    if speed is None:
        return False
    runner.choice = ChoiceModel(runner.choice.shape, speed)
    return True


def measure_prefills(runner: ContextParallelRunner, clock: Clock, budget_ns: int) -> list[PrefillPoint]:
    """What prefills of random tokens in private memory take: of each length from nothing, and behind as many.

    Longer and longer, as long as the next length should end within the budget. The slowest rank's times, the same on
    all ranks. Raises GroupFailed.
    """
    row_bytes = runner.model.spec.bytes_per_token // max(1, runner.choice.shape.cp)
    timer = _Timer(runner, clock)
    points: list[PrefillPoint] = []
    timer.prefill(PREFILL_TOKENS[0])  # warms up what is made at first use
    left_ns = budget_ns
    for tokens in PREFILL_TOKENS:
        if tokens * 2 * row_bytes > PREFILL_BYTES:
            break
        taken_ns = timer.prefill(tokens)
        points += [
            PrefillPoint(cached_tokens=cached, new_tokens=tokens, seconds=ns / 1e9)
            for cached, ns in zip((0, tokens), taken_ns, strict=True)
        ]
        left_ns -= sum(taken_ns)
        if left_ns < QUADRATIC * sum(taken_ns):
            break
    return points


class _Timer:
    """Times prefills of the whole group."""

    def __init__(self, runner: ContextParallelRunner, clock: Clock) -> None:
        self._runner = runner
        self._clock = clock

    def prefill(self, tokens: int) -> list[int]:
        """Nanoseconds of computing so many tokens, then as many behind them."""
        runner = self._runner
        generator = torch.Generator().manual_seed(SEED)
        ids: Sequence[int] = torch.randint(
            runner.model.config.vocabulary_size, (2 * tokens,), generator=generator
        ).tolist()
        shard = runner.private_shard(2 * tokens, tokens)
        taken_ns = []
        for stop in (tokens, 2 * tokens):
            runner.group.barrier()
            started_ns = self._clock.monotonic_ns()
            made = runner.prefill(shard, ids[:stop], tokens)
            self._finish()
            taken_ns.append(self._clock.monotonic_ns() - started_ns)
            shard = KVShard(arena=shard.arena, layout=made.layout)
        return self._slowest(taken_ns)

    def _finish(self) -> None:
        device = self._runner.model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _slowest(self, taken_ns: Sequence[int]) -> list[int]:
        own = torch.tensor(taken_ns, dtype=torch.int64, device=self._runner.model.device)
        return [int(one) for one in torch.stack(self._runner.group.all_gather(own)).amax(0)]
