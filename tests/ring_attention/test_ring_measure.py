"""Ring measure: all ranks get one result, and it is what the timed probes say."""

from dataclasses import replace

import msgspec
import pytest
import torch
from holdfast.kvstore.calibration import RingSpeed
from holdfast.kvstore.clock import SystemClock
from holdfast.ring_attention import ring_measure
from holdfast.ring_attention.choice import AttentionShape, decide
from holdfast.ring_attention.local import run_ranks
from holdfast.ring_attention.ring_measure import QUERIES, Sizes, measure_ring, shared, speed_of
from ring_helpers import CPU_FLASH

SHAPE = AttentionShape(heads=4, kv_heads=2, head_dim=16, value_dim=16, element_bytes=4, cp=2)
SIZES = Sizes(keys=1024, reads=8192, shift_bytes=1 << 20, exchange_bytes=1 << 21)
TRUTH = RingSpeed(
    flops_per_second=5e10,
    key_bytes_per_second=2e9,
    bytes_per_second=1e9,
    latency_ns=90_000,
    exchange_bytes_per_second=5e8,
    exchange_latency_ns=150_000,
    copy_bytes_per_second=1e10,
    overlap=0.25,
)


def timed(truth, slower=1.0):
    """What a machine that does exactly this takes for each probe."""
    reading = SIZES.reads * SHAPE.kv_token_bytes / truth.key_bytes_per_second
    pairs = SIZES.keys * SHAPE.pair_flops / truth.flops_per_second
    many, shift = QUERIES * pairs, truth.shift_seconds(SIZES.shift_bytes)
    seconds = {
        "many": many,
        "one": reading,
        "small shift": truth.latency_ns / 1e9,
        "shift": shift,
        "both": many + truth.exposed_seconds(SIZES.shift_bytes, many),
        "small exchange": truth.exchange_latency_ns / 1e9,
        "exchange": truth.exchange_latency_ns / 1e9 + SIZES.exchange_bytes / truth.exchange_bytes_per_second,
        "copy": SIZES.shift_bytes / truth.copy_bytes_per_second,
    }
    return {probe: round(value * slower * 1e9) for probe, value in seconds.items()}


def test_the_truth_is_found_in_exact_times():
    found = speed_of(SHAPE, SIZES, [timed(TRUTH)])
    for name in ring_measure.NUMBERS:
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=1e-3), name


def test_disturbed_rounds_do_not_count_but_are_told():
    rounds = [timed(TRUTH, slower=slower) for slower in (1.5, 30.0, 1.0, 3.0, 1.2)]
    found = speed_of(SHAPE, SIZES, rounds)
    assert found.flops_per_second == pytest.approx(TRUTH.flops_per_second, rel=1e-3)
    assert found.overlap == pytest.approx(TRUTH.overlap, rel=1e-3)
    assert found.spread == pytest.approx(0.5, rel=1e-3)


def test_noise_gives_no_rate_without_end():
    """A big message may take less time than a small one."""
    strange = timed(TRUTH) | {"small shift": 10**9, "small exchange": 10**9, "both": 1}
    found = speed_of(SHAPE, SIZES, [strange])
    assert found == msgspec.json.decode(msgspec.json.encode(found), type=RingSpeed)
    assert found.overlap == 1.0
    assert speed_of(SHAPE, SIZES, [timed(TRUTH) | {"both": 10**10}]).overlap == 0.0


@pytest.mark.parametrize("cp", [2, 3])
def test_all_ranks_get_the_same_which_fits_the_wire(cp, monkeypatch):
    monkeypatch.setattr(ring_measure, "PROBE_NS", 100_000)
    monkeypatch.setattr(ring_measure, "ROUNDS", 2)
    shape = replace(SHAPE, cp=cp)

    def rank(communicator):
        cpu = torch.device("cpu")
        return measure_ring(communicator, CPU_FLASH, shape, torch.float32, cpu, SystemClock())

    first, *others = run_ranks(cp, rank)
    assert all(other == first for other in others)
    assert msgspec.json.decode(msgspec.json.encode(first), type=RingSpeed) == first
    assert decide(shape, first, [(1, 1 << 20)]).pass_kv_seconds > 0


class SlowSecondRank(SystemClock):
    """A clock by which everything on this rank takes a second longer."""

    def __init__(self, rank):
        self.late_ns = 0
        self.step_ns = rank * 10**9

    def monotonic_ns(self):
        self.late_ns += self.step_ns
        return super().monotonic_ns() + self.late_ns


def test_the_slowest_rank_counts_and_time_is_bounded():
    def rank(communicator):
        cpu, clock = torch.device("cpu"), SlowSecondRank(communicator.rank)
        return measure_ring(communicator, CPU_FLASH, SHAPE, torch.float32, cpu, clock)

    first, second = run_ranks(2, rank)
    assert first == second
    assert first.latency_ns > 10**9
    assert first.spread == 0.0  # one round only: its budget was gone


@pytest.mark.parametrize("known", [TRUTH, None])
def test_what_rank_0_knows_all_know(known):
    def rank(communicator):
        return shared(communicator, known if communicator.rank == 0 else None, torch.device("cpu"))

    assert run_ranks(3, rank) == [known] * 3
