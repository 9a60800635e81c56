"""Choice: the paper's rules on the paper's own numbers, and what `auto` decides."""

from dataclasses import replace
from itertools import pairwise
from math import isclose, log

import pytest
from holdfast.kvstore.calibration import RingSpeed
from holdfast.ring_attention.choice import (
    LOCAL,
    PASS_KV,
    PASS_Q,
    AttentionShape,
    ChoiceModel,
    PaperSetting,
    algorithm1,
    algorithm5,
    decide,
    empirical,
    fit_empirical,
    pass_kv_from,
)
from hypothesis import given
from hypothesis import strategies as st

from fakes import RING_SPEED

# arXiv 2411.01783, table 4: (T, pass-KV ms, pass-Q ms), CP4, P + T = 128000, Llama3 405B.
TABLE_4 = (
    (1280, 1023.39, 898.71),
    (3200, 1110.18, 1046.43),
    (4160, 1298.92, 1280.1),
    (6400, 1305.56, 1302.01),
    (12800, 2080.67, 2205.27),
    (25600, 3353.02, 3617.02),
    (38400, 4629.23, 4922.52),
    (51200, 5745.08, 6217.83),
    (64000, 6845.21, 7367.99),
    (76800, 7890.35, 8468.66),
    (89600, 8697.27, 9666.62),
    (102400, 10105.78, 10652.39),
    (115200, 11136.4, 11571.62),
    (128000, 11462.15, 12360.57),
)
TOKENS = 128_000
PEAKS = PaperSetting(
    ranks=4, flops_per_second=8 * 800e12, bytes_per_second=8 * 50e9, element_bytes=2, heads=128, kv_heads=8
)


def right_rows(chosen):
    return sum(chosen(t) == (PASS_KV if kv <= q else PASS_Q) for t, kv, q in TABLE_4)


def test_the_papers_rules_at_peaks_get_as_many_rows_of_its_table_right_as_they_should():
    assert right_rows(lambda t: algorithm1(PEAKS, t, TOKENS - t)) == 12
    assert right_rows(lambda t: algorithm5(PEAKS, t, TOKENS - t)) == 11


def test_the_papers_thresholds():
    assert PEAKS.eq2_new_tokens() == 4000  # 3.125 % of 128000
    assert PEAKS.eq3_tokens() == 32_000
    assert isclose(PEAKS.eq5_all2all_seconds(1000, 16384), 3 * 16385 * 1000 * 2 / 400e9)


def test_the_published_coefficients_are_of_no_use_but_fitted_ones_are():
    published = (-1.059, 1.145, 12.112)
    assert right_rows(lambda t: PASS_KV if empirical(t, TOKENS - t, *published) > 0 else PASS_Q) == 4
    fitted = fit_empirical([(t, TOKENS - t, log(q / kv)) for t, kv, q in TABLE_4])
    assert right_rows(lambda t: PASS_KV if empirical(t, TOKENS - t, *fitted) > 0 else PASS_Q) >= 12


def test_a_fit_finds_the_coefficients_of_points_that_lie_on_the_form():
    grid = [(t, p) for t in (16, 64, 1000) for p in (0, 500, 30_000)]
    found = fit_empirical([(t, p, empirical(t, p, -0.5, 0.7, 3.0)) for t, p in grid])
    assert found == pytest.approx((-0.5, 0.7, 3.0), abs=1e-4)


# The room's machine: 8 query heads, 2 kv heads, d=64, float32, 2 ranks of one core on gloo.
SHAPE = AttentionShape(heads=8, kv_heads=2, head_dim=64, value_dim=64, element_bytes=4, cp=2)
GLOO = replace(RING_SPEED, overlap=0.0)


@pytest.mark.parametrize(("new_tokens", "best"), [(64, PASS_Q), (320, PASS_Q), (1024, PASS_Q), (16_384, PASS_KV)])
def test_it_chooses_what_was_measured_to_be_faster_on_gloo(new_tokens, best):
    assert decide(SHAPE, GLOO, [(new_tokens, 32_768)]).strategy == best


def test_with_full_overlap_the_threshold_comes_down():
    hidden = replace(GLOO, overlap=1.0)
    exposed_from, hidden_from = (pass_kv_from(SHAPE, speed, 32_768) for speed in (GLOO, hidden))
    assert exposed_from is not None
    assert hidden_from is not None
    assert 1 < hidden_from < exposed_from


def test_own_queries_hide_the_exchange_once_they_fill_kernel_calls():
    """512 new tokens of this shape are 1,024 rows a kv head and rank."""
    hidden = replace(GLOO, overlap=1.0)
    for new_tokens, hides in ((64, False), (512, False), (1024, True)):
        exposed, less = (decide(SHAPE, speed, [(new_tokens, 32_768)]).pass_q_seconds for speed in (GLOO, hidden))
        assert (less < exposed) == hides
    exchange = GLOO.exchange_seconds(512 * SHAPE.query_token_bytes)
    assert exposed - less <= exchange
    half = decide(SHAPE, replace(GLOO, overlap=0.5), [(1024, 32_768)]).pass_q_seconds
    assert half == pytest.approx((exposed + less) / 2)


def test_a_full_prefill_goes_by_pass_kv():
    assert decide(SHAPE, GLOO, [(8192, 0)]).strategy == PASS_KV


def test_a_tie_goes_to_pass_kv():
    for speed in (GLOO, None):
        assert decide(SHAPE, speed, [(0, 0)]).strategy == PASS_KV


def test_one_rank_has_nothing_to_choose():
    decision = decide(replace(SHAPE, cp=1), GLOO, [(8, 100)])
    assert (decision.strategy, decision.pass_kv_seconds, decision.pass_q_seconds) == (LOCAL, 0.0, 0.0)


def test_the_reason_is_one_line_with_the_numbers():
    reason = ChoiceModel(SHAPE, GLOO).decide([(64, 32_768)]).reason
    assert reason.startswith("pass_q: exposes 0.")
    assert reason.endswith("(T=64, P=32768, cp=2)")
    assert "pass_kv 14" in reason
    assert "\n" not in reason


def test_without_a_speed_bytes_decide():
    few, many = (decide(SHAPE, None, [(new, 32_768)]) for new in (64, 32_768))
    assert (few.strategy, many.strategy) == (PASS_Q, PASS_KV)
    assert few.pass_kv_seconds is None
    assert "not calibrated" in few.reason


def test_sequences_add_up():
    alone = decide(SHAPE, GLOO, [(64, 32_768)])
    four = decide(SHAPE, replace(GLOO, latency_ns=0, exchange_latency_ns=0), [(16, 8192)] * 4)
    assert four.strategy == alone.strategy
    assert "4 sequences, T=64, P=32768" in four.reason
    assert four.pass_kv_seconds == pytest.approx(alone.pass_kv_seconds, rel=0.02)


def test_layers_with_a_window_send_little_kv_and_all_queries():
    full, half, none = (
        decide(replace(SHAPE, windows=windows), GLOO, [(1024, 32_768)]) for windows in ((None,), (None, 128), (128,))
    )
    assert half.pass_kv_seconds == pytest.approx((full.pass_kv_seconds + none.pass_kv_seconds) / 2)
    assert none.pass_q_seconds == pytest.approx(full.pass_q_seconds)
    assert none.pass_kv_seconds < full.pass_kv_seconds / 10
    assert (full.strategy, none.strategy) == (PASS_Q, PASS_KV)
    wide = decide(replace(SHAPE, windows=(1 << 20,)), GLOO, [(1024, 32_768)])
    assert wide == full
    assert decide(replace(SHAPE, windows=(128,)), None, [(1024, 32_768)]).strategy == PASS_KV


def test_a_rank_that_holds_nearly_all_makes_pass_q_wait_for_it():
    even = decide(SHAPE, GLOO, [(1024, 32_768)])
    uneven = decide(SHAPE, GLOO, [(1024, 32_768)], cached=[(32_768, 0)])
    assert (even.strategy, uneven.strategy) == (PASS_Q, PASS_KV)
    assert uneven.pass_q_seconds > 10 * even.pass_q_seconds
    assert uneven.pass_kv_seconds > even.pass_kv_seconds  # the largest message is longer


RATES = st.floats(1e8, 1e15)
SPEEDS = st.builds(
    lambda flops, keys, link, latency, slower, copies, overlap: RingSpeed(
        flops_per_second=flops,
        key_bytes_per_second=keys,
        bytes_per_second=link,
        latency_ns=latency,
        exchange_bytes_per_second=link / slower,
        exchange_latency_ns=latency * slower,
        copy_bytes_per_second=copies,
        overlap=overlap,
    ),
    RATES,
    RATES,
    st.floats(1e8, 1e12),
    st.floats(0, 1e6),
    st.floats(1, 4),
    RATES,
    st.floats(0, 1),
)
SHAPES = st.builds(
    lambda kv_heads, group, dim, element, cp, windows: AttentionShape(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=dim,
        value_dim=dim,
        element_bytes=element,
        cp=cp,
        windows=windows,
    ),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 2, 4, 16]),
    st.sampled_from([32, 64, 128, 256]),
    st.sampled_from([2, 4]),
    st.integers(2, 16),
    st.sampled_from([(None,), (128,), (None, 4096), (None, 1, 100_000)]),
)
TOKENS_OF = st.integers(0, 1 << 20)


@given(SHAPES, SPEEDS, TOKENS_OF, st.lists(st.integers(1, 1 << 20), min_size=2, max_size=6, unique=True))
def test_more_new_tokens_never_turn_pass_kv_into_pass_q(shape, speed, cached, new_tokens):
    chosen = [decide(shape, speed, [(new, cached)]).strategy for new in sorted(new_tokens)]
    assert all((before, after) != (PASS_KV, PASS_Q) for before, after in pairwise(chosen))


@given(SHAPES, SPEEDS, st.lists(st.tuples(TOKENS_OF, TOKENS_OF), min_size=1, max_size=4), st.integers(0, 99))
def test_seconds_are_never_negative_and_uneven_shards_never_cost_less(shape, speed, sequences, seed):
    even = decide(shape, speed, sequences)
    lumps = [[before if rank == seed % shape.cp else 0 for rank in range(shape.cp)] for _, before in sequences]
    uneven = decide(shape, speed, sequences, cached=lumps)
    pairs, cached = sum(new * (new + before) for new, before in sequences), sum(before for _, before in sequences)
    computing = pairs * shape.pair_flops / speed.flops_per_second
    rounding = 1e-12 * (computing + cached * shape.kv_token_bytes / speed.key_bytes_per_second)
    assert 0 <= even.pass_kv_seconds <= uneven.pass_kv_seconds * (1 + 1e-9) + rounding
    assert 0 <= even.pass_q_seconds <= uneven.pass_q_seconds * (1 + 1e-9) + rounding


@given(SHAPES, SPEEDS, TOKENS_OF, TOKENS_OF, st.sampled_from([0.25, 2.0, 1024.0]))
def test_the_unit_of_time_does_not_matter(shape, speed, new, cached, faster):
    scaled = RingSpeed(
        flops_per_second=speed.flops_per_second * faster,
        key_bytes_per_second=speed.key_bytes_per_second * faster,
        bytes_per_second=speed.bytes_per_second * faster,
        latency_ns=speed.latency_ns / faster,
        exchange_bytes_per_second=speed.exchange_bytes_per_second * faster,
        exchange_latency_ns=speed.exchange_latency_ns / faster,
        copy_bytes_per_second=speed.copy_bytes_per_second * faster,
        overlap=speed.overlap,
    )
    before, after = (decide(shape, s, [(new, cached)]) for s in (speed, scaled))
    assert before.pass_q_seconds == pytest.approx(after.pass_q_seconds * faster)
    assert before.pass_kv_seconds == pytest.approx(after.pass_kv_seconds * faster)


@given(SHAPES, SPEEDS, st.integers(1, 1 << 18))
def test_the_threshold_is_where_the_choice_turns(shape, speed, cached):
    found = pass_kv_from(shape, speed, cached)
    if found is None:
        assert decide(shape, speed, [(cached, cached)]).strategy == PASS_Q
        return
    assert decide(shape, speed, [(found, cached)]).strategy == PASS_KV
    assert found == 1 or decide(shape, speed, [(found - 1, cached)]).strategy == PASS_Q


SETTINGS = st.builds(
    PaperSetting,
    ranks=st.integers(2, 32),
    flops_per_second=RATES,
    bytes_per_second=RATES,
    element_bytes=st.sampled_from([1, 2, 4]),
    heads=st.sampled_from([32, 128]),
    kv_heads=st.sampled_from([1, 8, 32]),
)


@given(SETTINGS, TOKENS_OF, st.lists(st.integers(1, 1 << 20), min_size=2, max_size=6, unique=True))
def test_the_papers_rules_are_monotone_too(setting, cached, new_tokens):
    for rule in (algorithm1, algorithm5):
        chosen = [rule(setting, new, cached) for new in sorted(new_tokens)]
        assert all((before, after) != (PASS_KV, PASS_Q) for before, after in pairwise(chosen))
