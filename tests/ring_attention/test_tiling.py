import torch
from holdfast.kvstore.layout import Span, striped
from holdfast.ring_attention.band import Band, causal
from holdfast.ring_attention.kernels.registry import KERNELS
from holdfast.ring_attention.positions import ENTRY_SPANS, KeptPositions, Positions
from holdfast.ring_attention.tiling import MASKED_AREA, tiles
from hypothesis import given
from hypothesis import strategies as st
from ring_cases import examples

CPU, WINDOWS = (KERNELS[name].capabilities.takes for name in ("cpu_flash", "reference"))


def every(positions):
    return positions.tensor(0, len(positions), torch.device("cpu")) if len(positions) else torch.empty(0)


def seen(queries, keys, band):
    """What the band shows, position by position."""
    distance = every(keys)[None, :] - every(queries)[:, None]
    low = -(10**9) if band.first is None else band.first
    high = 10**9 if band.last is None else band.last
    return (distance >= low) & (distance <= high)


def check(queries, keys, band, native):
    """Each pair that is seen is in one tile that shows it, and no other pair is shown."""
    shown = torch.zeros(len(queries), len(keys), dtype=torch.int64)
    wanted = seen(queries, keys, band)
    plan = tiles(queries, keys, band, native)
    for tile in plan:
        (a, b), (c, d) = tile.queries, tile.keys
        if tile.band is None:
            shown[a:b, c:d] += wanted[a:b, c:d]
            assert (b - a) * (d - c) <= MASKED_AREA
        else:
            part = seen(Positions([Span(0, b - a)]), Positions([Span(0, d - c)]), tile.band)
            assert part.any(0).all()
            assert part.any(1).all()
            assert native(tile.band, b - a, d - c)
            shown[a:b, c:d] += part
    assert torch.equal(shown, wanted.to(torch.int64))
    return plan


@st.composite
def positions(draw):
    """Runs of any length with any gaps."""
    edges = draw(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 300)), max_size=6))
    spans, at = [], 0
    for gap, length in edges:
        spans.append(Span(at + gap, at + gap + length))
        at += gap + length
    return Positions(spans)


@given(
    positions(),
    positions(),
    st.one_of(
        st.builds(causal, st.one_of(st.none(), st.integers(1, 600))),
        st.builds(Band, st.one_of(st.none(), st.integers(-200, 0)), st.one_of(st.none(), st.integers(0, 200))),
    ),
    st.sampled_from([CPU, WINDOWS]),
)
@examples(300)
def test_tiles_cover_each_pair_once(queries, keys, band, native):
    check(queries, keys, band, native)


def test_positions_are_kept_for_the_same_tuples_in_bounded_memory():
    """A tail dealt over ranks has a span for each token: what is kept is counted in spans, not in tuples."""
    kept = KeptPositions(2 * (ENTRY_SPANS + 100))
    first, second, third = (tuple(Span(2 * i, 2 * i + 1) for i in range(100)) for _ in range(3))
    large = tuple(Span(2 * i, 2 * i + 1) for i in range(1000))
    made = [kept.of(first), kept.of(second)]
    assert [kept.of(first), kept.of(second)] == made  # the same objects
    kept.of(first)
    kept.of(third)
    assert kept.of(first) is made[0]
    assert kept.of(second) is not made[1]
    assert kept.of(large) is kept.of(large)
    assert kept.of(first) is not made[0]


def run(start, stop):
    return Positions([Span(start, stop)])


def test_keys_before_all_queries_are_one_call():
    """Whatever lies between them: a document's tail that decode dealt one by one, too."""
    dealt = Positions(striped(3000, 2).spans(0))
    assert len(check(run(3000, 4000), dealt, causal(None), CPU)) == 1
    # The window's edge is masked in blocks, not token by token.
    assert len(check(run(3000, 3400), dealt, causal(1500), CPU)) < 12


def test_a_kernel_with_windows_gets_no_key_that_only_a_dropped_query_reached_for():
    """Neither behind its last query nor before its first: a window that ends before a key is, to kernels, no window."""
    for queries, keys in (
        ([Span(0, 4), Span(1000, 1010)], Span(2, 500)),
        ([Span(0, 4), Span(1000, 1010)], Span(6, 1005)),
    ):
        check(Positions(queries), Positions([keys]), causal(3), WINDOWS)


def test_a_prefill_chunk_takes_few_calls():
    """A causal square is one call; queries behind their prefix take the prefix and the square."""
    assert len(check(run(0, 5000), run(0, 5000), causal(None), CPU)) == 1
    assert len(check(run(5000, 6000), run(0, 6000), causal(None), CPU)) == 2
    zigzag = Positions([Span(0, 1000), Span(3000, 4000)])
    assert len(check(zigzag, zigzag, causal(None), CPU)) == 3


def test_a_window_costs_what_it_shows():
    """Keys outside the band are touched only along its edges."""
    for window, tokens in ((64, 5000), (500, 3000), (4000, 1000)):
        plan = check(run(8000, 8000 + tokens), run(0, 8000 + tokens), causal(window), CPU)
        area = sum((t.queries[1] - t.queries[0]) * (t.keys[1] - t.keys[0]) for t in plan)
        assert area < 2 * tokens * (window + 250), (window, area)
