"""The cost model against golden vectors computed independently (0.5 % tolerance)."""

from __future__ import annotations

import math

import pytest
from holdfast.kvstore import costs
from holdfast.kvstore.costs import DEFAULT_LINKS, LONGEST_NS, LinkSpeed, PrefillCurve, PrefillPoint, Restore
from holdfast.kvstore.spec import GroupKind, KVSpec, LayerGroup
from hypothesis import given
from hypothesis import strategies as st

H100 = {"hbm_bytes_per_second": 3.35e12, "peak_flops_per_second": 989.4e12}
LLAMA_70B = {"active_params": 70.55e9, "layers": 80, "heads": 64, "qk_dim": 128, "v_dim": 128}
LLAMA_405B = {"active_params": 405e9, "layers": 126, "heads": 128, "qk_dim": 128, "v_dim": 128}
WEIGHTS_70B = 141.1e9


def near(value):
    return pytest.approx(value, rel=0.005)


def spec(*, layers, kv_heads=8, key_dim=128, value_dim=128, dtype="bfloat16", window=None):
    kind = GroupKind.SLIDING if window else GroupKind.GQA if value_dim else GroupKind.MLA
    group = LayerGroup(
        kind=kind,
        layers=tuple(range(layers)),
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        window=window,
    )
    return KVSpec(groups=(group,), dtype=dtype, model="golden", vocabulary_size=1000, extent_blocks=1)


LLAMA_KV = spec(layers=80)
YI_KV = spec(layers=60)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, 327_680), (128_000, 41.9e9), (131_072, 42.9e9), (131_072, 40.0 * 2**30), (10**6, 328e9)],
)
def test_v01_kv_bytes_of_llama_70b(tokens, expected):
    assert costs.kv_bytes(spec=LLAMA_KV, token_count=tokens) == near(expected)


def test_v01_fp8_halves_it():
    fp8 = spec(layers=80, dtype="float8_e4m3fn")
    assert costs.kv_bytes(spec=fp8, token_count=128_000) == near(21.0e9)


def test_v02_latent_cache_of_deepseek():
    mla = spec(layers=61, kv_heads=1, key_dim=576, value_dim=0)
    assert costs.kv_bytes(spec=mla, token_count=1) == 70_272
    assert costs.kv_bytes(spec=mla, token_count=131_072) == near(9.21e9)
    assert LLAMA_KV.bytes_per_token / mla.bytes_per_token == near(4.66)
    assert costs.kv_bytes(spec=mla, token_count=1, tp=8) == 8 * 70_272


def test_kv_bytes_knows_windows_pages_and_replicated_heads():
    sliding = spec(layers=1, window=100)
    per_token = sliding.bytes_per_token
    assert costs.kv_bytes(spec=sliding, token_count=10**6) == 100 * per_token
    assert costs.kv_bytes(spec=sliding, token_count=90, page_tokens=64) == 128 * per_token
    assert costs.kv_bytes(spec=LLAMA_KV, token_count=1, tp=8) == 327_680
    assert costs.kv_bytes(spec=LLAMA_KV, token_count=1, tp=16) == 2 * 327_680


def test_v04_prefill_flops():
    linear = costs.linear_flops(active_params=70.55e9, new_tokens=128_000)
    total = costs.prefill_flops(**LLAMA_70B, new_tokens=128_000)
    assert linear == near(1.81e16)
    assert total - linear == near(2.15e16)
    assert total == near(3.95e16)
    assert (total - linear) / linear == near(1.19)
    assert costs.crossover_tokens(**LLAMA_70B) == near(1.08e5)


def h100_prefill(flops, gpus):
    return costs.prefill_seconds(
        flops=flops,
        gpu_count=gpus,
        peak_flops_per_second=H100["peak_flops_per_second"],
        compute_efficiency=0.4,
    )


def test_v06_prefill_seconds():
    linear = costs.linear_flops(active_params=70.55e9, new_tokens=128_000)
    total = costs.prefill_flops(**LLAMA_70B, new_tokens=128_000)
    assert h100_prefill(linear, 1) == near(45.6)
    assert h100_prefill(total, 1) == near(99.9)
    assert h100_prefill(total, 8) == near(12.5)
    assert h100_prefill(total, 5) < 20 < h100_prefill(total, 4)


@pytest.mark.parametrize(
    ("tokens", "seconds", "flops", "rate"),
    [(10**6, 77, 4.94e18, 501e12), (128_000, 3.8, 1.71e17, 352e12)],
)
def test_v07_llama_405b(tokens, seconds, flops, rate):
    total = costs.prefill_flops(**LLAMA_405B, new_tokens=tokens)
    assert total == near(flops)
    assert total / seconds / 128 == near(rate)
    assert costs.parity_miss_ratio(heads=128, kv_heads=8) == 0.125


@pytest.mark.parametrize(("batch", "efficiency", "seconds"), [(1, 1.0, 6.83e-3), (4, 0.7, 16.5e-3)])
def test_v08_decode_roofline(batch, efficiency, seconds):
    one = costs.prefill_flops(**LLAMA_70B, new_tokens=1, cached_tokens=128_000)
    kv = costs.kv_bytes(spec=LLAMA_KV, token_count=128_000)
    step = costs.decode_step_seconds(
        weight_bytes=WEIGHTS_70B,
        batch_kv_bytes=batch * kv,
        step_flops=batch * one,
        gpu_count=8,
        memory_efficiency=efficiency,
        **H100,
    )
    assert step == near(seconds)
    assert one / (8 * H100["peak_flops_per_second"]) == near(0.0602e-3)
    if batch == 4:
        assert batch / step == near(243)


def test_decode_is_bound_by_compute_when_that_is_slower():
    step = costs.decode_step_seconds(weight_bytes=1, batch_kv_bytes=1, step_flops=989.4e12, gpu_count=1, **H100)
    assert step == near(1.0)


def test_v10_concurrency():
    node = {"weight_bytes": WEIGHTS_70B, "hbm_bytes": 80e9}
    node |= {"usable_share": 0.9, "overhead_bytes": 4e9}
    short = costs.kv_bytes(spec=LLAMA_KV, token_count=128_000)
    long = costs.kv_bytes(spec=LLAMA_KV, token_count=10**6)
    assert costs.gpus_needed(kv_bytes=short, **node) == 3
    assert costs.gpus_needed(kv_bytes=long, **node) == 7
    assert costs.concurrent_sessions(gpu_count=8, session_kv_bytes=short, **node) == 9
    assert costs.concurrent_sessions(gpu_count=1, session_kv_bytes=short, **node) == 0


@pytest.mark.parametrize(
    ("hbm_bytes", "tokens", "sessions"),
    [(80e9, 50_000, 0), (80 * 2**30, 50_000, 1), (80e9, 4096, 11), (80 * 2**30, 4096, 17)],
)
def test_v10_yi_depends_on_what_a_gigabyte_is(hbm_bytes, tokens, sessions):
    kv = costs.kv_bytes(spec=YI_KV, token_count=tokens)
    found = costs.concurrent_sessions(gpu_count=1, hbm_bytes=hbm_bytes, weight_bytes=68e9, session_kv_bytes=kv)
    assert found == sessions


def test_v11_session_of_yi():
    kv = costs.kv_bytes(spec=YI_KV, token_count=50_000)
    token = costs.decode_step_seconds(
        weight_bytes=68e9,
        batch_kv_bytes=kv,
        step_flops=0,
        gpu_count=1,
        hbm_bytes_per_second=2e12,
        peak_flops_per_second=312e12,
    )
    swap = costs.context_switch_seconds(out_bytes=kv, in_bytes=kv, out_bytes_per_second=20e9, in_bytes_per_second=20e9)
    busy = costs.session_busy_seconds(
        prefill_seconds=14.1,
        rounds=5,
        answer_tokens=250,
        token_seconds=token,
        switches=5,
        switch_seconds=swap,
    )
    share = costs.switch_share(switches=5, switch_seconds=swap, busy_seconds=busy)
    assert (250 * token, swap, busy, share) == (near(10.0), near(1.23), near(70.4), near(0.0872))


def test_load_or_recompute_breaks_even_where_the_model_says():
    kv = costs.kv_bytes(spec=LLAMA_KV, token_count=128_000)
    prefill = h100_prefill(costs.prefill_flops(**LLAMA_70B, new_tokens=128_000), 8)
    assert costs.break_even_bytes_per_second(kv_bytes=kv, recompute_seconds=prefill) == near(3.36e9)
    for speed, verdict in [(7e9, Restore.LOAD), (3e9, Restore.RECOMPUTE)]:
        load = costs.move_seconds(size_bytes=kv, bytes_per_second=speed)
        assert costs.load_or_recompute(load_seconds=load, recompute_seconds=prefill) is verdict
    assert costs.load_or_recompute(load_seconds=1.0, recompute_seconds=1.0) is Restore.LOAD


def test_money():
    kv = costs.kv_bytes(spec=LLAMA_KV, token_count=128_000)
    prefill = 99.9
    dollars = prefill * 3 / 3600
    hbm = costs.break_even_idle_hours(prefill_dollars=dollars, kv_bytes=kv, gb_hour_dollars=3 / 80)
    ddr = costs.break_even_idle_hours(prefill_dollars=dollars, kv_bytes=kv, gb_hour_dollars=0.005)
    assert (hbm * 60, ddr) == (near(3.18), near(0.397))
    assert math.isinf(costs.break_even_idle_hours(prefill_dollars=1, kv_bytes=kv, gb_hour_dollars=0))
    for price, expected in [(3 / 80, 0.128), (0.005, 0.060)]:
        query = costs.query_dollars(
            prefill_seconds=prefill,
            query_seconds=3 * 18.1,
            gpu_count=1,
            gpu_hour_dollars=3,
            kv_bytes=kv,
            gb_hour_dollars=price,
            held_hours=1,
            queries=20,
        )
        assert query == near(expected)


def test_moves():
    alone = costs.move_seconds(size_bytes=14e9, bytes_per_second=7e9)
    blocks = costs.move_seconds(
        size_bytes=14e9,
        bytes_per_second=7e9,
        efficiency=0.5,
        parallel_links=2,
        block_count=1000,
        block_latency_seconds=1e-4,
    )
    assert (alone, blocks) == (near(2.0), near(2.1))
    assert costs.path_seconds([1.0, 3.0, 2.0]) == 3.0
    assert costs.path_seconds([]) == 0.0


def test_a_mixture_reads_more_experts_in_larger_batches():
    model = {"shared_params": 1e9, "expert_params": 8e9, "experts": 8, "top_k": 2}
    assert costs.touched_params(**model, batch=1) == near(3e9)
    assert costs.touched_params(**model, batch=1000) == near(9e9)


@given(
    st.integers(0, 60),
    st.integers(0, 60),
    st.one_of(st.none(), st.integers(min_value=1, max_value=80)),
)
def test_pairs_are_the_sum_over_queries(cached, new, window):
    limit = window or cached + new + 1
    expected = sum(min(i, limit) for i in range(cached + 1, cached + new + 1))
    assert costs.causal_pairs(cached_tokens=cached, new_tokens=new, window=window) == expected


SIZES = st.lists(st.tuples(st.integers(0, 100_000), st.integers(64, 100_000)), min_size=4, max_size=20)


@given(SIZES, st.floats(1e-6, 1e-3), st.floats(1e-11, 1e-7))
def test_the_curve_finds_the_line_it_was_drawn_from(sizes, a, b):
    truth = PrefillCurve(seconds_per_token=a, seconds_per_pair=b)
    points = [
        PrefillPoint(cached_tokens=p, new_tokens=t, seconds=truth.seconds(p, t))
        for p, t in [*sizes, (0, 1000), (0, 100_000), (100_000, 1000)]
    ]
    fit = PrefillCurve().fitted(points)
    assert fit.seconds_per_token == pytest.approx(a, rel=1e-3, abs=1e-9)
    assert fit.seconds_per_pair == pytest.approx(b, rel=1e-3, abs=1e-13)
    assert fit.point_count == len(points)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**6), st.floats(0, 1e4))))
def test_a_fit_is_never_negative_and_beats_its_neighbours(samples):
    points = [PrefillPoint(cached_tokens=p, new_tokens=t, seconds=s) for p, t, s in samples]
    fit = PrefillCurve().fitted(points)
    assert fit.seconds_per_token >= 0
    assert fit.seconds_per_pair >= 0
    assert fit.marginal_prefill_ns(5, 5) == 0

    def loss(a, b):
        curve = PrefillCurve(seconds_per_token=a, seconds_per_pair=b)
        return sum((curve.seconds(p, t) - s) ** 2 for p, t, s in samples)

    if fit.point_count < 3:
        return
    a, b = fit.seconds_per_token, fit.seconds_per_pair
    best = loss(a, b)
    on_prior_ray = a * 1.33e-9 == pytest.approx(b * 4.06e-5)  # alike points only scale the prior
    neighbours = [(a * 1.01, b * 1.01), (a * 0.99, b * 0.99)]
    if not on_prior_ray:
        neighbours += [(a * 1.01, b), (a * 0.99, b), (a, b * 1.01), (a, b * 0.99)]
    for other in neighbours:
        assert best <= loss(*other) * (1 + 1e-6) + 1e-9


def test_one_point_scales_the_prior_and_none_keeps_it():
    prior = PrefillCurve()
    assert prior.fitted([]) == prior
    twice = 2 * prior.seconds(0, 8192)
    fit = prior.fitted([PrefillPoint(cached_tokens=0, new_tokens=8192, seconds=twice)])
    assert fit.seconds_per_token == pytest.approx(2 * prior.seconds_per_token)
    assert fit.seconds_per_pair == pytest.approx(2 * prior.seconds_per_pair)


def test_deeper_extents_cost_more_and_marginals_add_up():
    curve = PrefillCurve()
    assert curve.marginal_prefill_ns(100_000, 101_000) > curve.marginal_prefill_ns(0, 1000)
    parts = sum(curve.marginal_prefill_ns(i, i + 1000) for i in range(0, 100_000, 1000))
    assert parts == pytest.approx(curve.marginal_prefill_ns(0, 100_000), rel=1e-6)


def test_what_is_predicted_from_absurd_measurements_fits_into_a_message():
    """A group may claim a second a token, or a million: the daemon shows what follows, and must be able to."""
    curve = PrefillCurve().fitted([PrefillPoint(cached_tokens=0, new_tokens=1, seconds=1e6)])
    assert curve.marginal_prefill_ns(0, 1 << 31) == LONGEST_NS < 1 << 62
    for link in (LinkSpeed(bytes_per_second=1.0, latency_ns=0.0), LinkSpeed(bytes_per_second=1e9, latency_ns=1e18)):
        assert link.move_ns(1 << 50) == LONGEST_NS


def test_every_hop_has_a_prior_in_the_range_of_real_hardware():
    pairs = {"nvme->ddr", "ddr->nvme", "ddr->hbm", "hbm->ddr"}
    assert set(DEFAULT_LINKS) == pairs
    for link in DEFAULT_LINKS.values():
        assert link.move_count == 0
        assert 1e9 < link.bytes_per_second < 1e11
        assert link.move_ns(0) == 0
        assert link.move_ns(8 << 20) > link.latency_ns


@given(st.floats(1e8, 1e11), st.floats(1e3, 1e7))
def test_a_link_learns_what_it_sees(speed, latency_ns):
    truth = LinkSpeed(bytes_per_second=speed, latency_ns=latency_ns)
    link = LinkSpeed.default("nvme->ddr")
    sizes = [4096, 8 << 20, 64 << 10, 256 << 20]
    for turn in range(400):
        size = sizes[turn % 4]
        link = link.observed(size, max(1, truth.move_ns(size)))
    assert link.move_count == 400
    for size in (4096, 256 << 20):
        assert link.move_ns(size) == pytest.approx(truth.move_ns(size), rel=0.3)


def test_one_stall_moves_a_link_little_and_nothing_teaches_nothing():
    link = LinkSpeed.default("ddr->hbm")
    stalled = link.observed(64 << 20, 10**12)
    assert link.bytes_per_second / 2 < stalled.bytes_per_second < link.bytes_per_second
    assert link.observed(0, 5) is link
    assert link.observed(5, 0) is link
