"""Group measure: what a group's runners say they are, were measured to do, and decide by."""

import pytest
import torch
from holdfast.kvstore.calibration import RingRate
from holdfast.kvstore.clock import SystemClock
from holdfast.ring_attention import group_measure, ring_measure
from holdfast.ring_attention.choice import pass_kv_from
from holdfast.ring_attention.group_measure import CACHED_TOKENS, choose_by, measure_prefills, measure_rate, setting_of
from ring_helpers import TINY
from runner_helpers import on_grid

from fakes import RING_SETTING, RING_SPEED

GRIDS = [(2, 1), (2, 2), (3, 1)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ring_measure, "PROBE_NS", 100_000)
    monkeypatch.setattr(ring_measure, "ROUNDS", 2)


@pytest.mark.parametrize(("cp", "tp"), GRIDS)
def test_all_ranks_of_a_grid_are_measured_alike_in_their_own_setting(cp, tp):
    def rank(runner):
        setting = setting_of(runner, "a box")
        rate = measure_rate(runner, setting, SystemClock())
        assert choose_by(runner, rate if runner.group.rank == 0 else None)
        return rate.speed, rate.setting, rate.pass_kv_from, runner.choice

    found = on_grid(cp, tp, rank)
    assert all(one == found[0] for one in found)
    speed, setting, thresholds, choice = found[0]
    assert (setting.cp, setting.tp, setting.kernel, setting.communicator) == (cp, tp, "cpu_flash", "local")
    assert (setting.heads, setting.kv_heads) == (TINY.heads // tp, TINY.kv_heads // tp)
    assert setting.device == f"cpu, threads {torch.get_num_threads()}"
    assert choice.speed == speed
    assert thresholds == tuple((tokens, pass_kv_from(choice.shape, speed, tokens)) for tokens in CACHED_TOKENS)


@pytest.mark.parametrize("known", [RingRate(setting=RING_SETTING, speed=RING_SPEED, measured_wall_ns=1), None])
def test_a_group_decides_by_what_rank_0_knows(known):
    def rank(runner):
        chose = choose_by(runner, known if runner.group.rank == 0 else None)
        return chose, runner.choice.speed

    expected = (False, None) if known is None else (True, RING_SPEED)
    assert on_grid(2, 2, rank) == [expected] * 4


@pytest.mark.parametrize(("cp", "tp"), [(1, 1), *GRIDS])
def test_prefills_are_timed_from_nothing_and_behind_others(cp, tp, monkeypatch):
    monkeypatch.setattr(group_measure, "PREFILL_TOKENS", (8, 16, 32))
    found = on_grid(cp, tp, lambda runner: measure_prefills(runner, SystemClock(), 10**12))
    assert all(points == found[0] for points in found)
    assert [(p.cached_tokens, p.new_tokens) for p in found[0]] == [(0, 8), (8, 8), (0, 16), (16, 16), (0, 32), (32, 32)]
    assert all(point.seconds > 0 for point in found[0])


def test_the_budget_and_the_memory_bound_how_long_prefills_get(monkeypatch):
    monkeypatch.setattr(group_measure, "PREFILL_TOKENS", (8, 16, 32))
    assert len(on_grid(2, 1, lambda runner: measure_prefills(runner, SystemClock(), 0))[0]) == 2
    monkeypatch.setattr(group_measure, "PREFILL_BYTES", 16 * 512)  # 512 bytes of KV per token, over two ranks
    points = on_grid(2, 1, lambda runner: measure_prefills(runner, SystemClock(), 10**12))[0]
    assert max(point.new_tokens for point in points) == 16
