"""Prefill curves: one for each number of ranks, remembered over a restart."""

from dataclasses import replace

import msgspec
import pytest
from holdfast.kvstore.catalog import Catalog
from holdfast.kvstore.costs import PrefillCurve, PrefillPoint
from holdfast.kvstore.errors import InvalidRequest, SpecMismatch
from holdfast.kvstore.measurements import Measured
from holdfast.kvstore.orders import PutPrefills, Write
from holdfast.kvstore.prefills import CURVES_KEPT, POINTS_KEPT, Prefill, Prefills
from hypothesis import given
from hypothesis import strategies as st

from fakes import tiny_service, tiny_spec
from scene import FINGERPRINT, Scene, tokens

MODEL = b"model"


def of(ranks, *seconds):
    return [Prefill(0, 1000, s, ranks) for s in seconds]


def test_a_group_is_priced_by_its_own_curve_and_others_by_the_last_one():
    prefills = Prefills({})
    assert prefills.curve(MODEL) == prefills.curve(MODEL, 2) == PrefillCurve()
    prefills.observe(MODEL, of(1, 8.0))
    prefills.observe(MODEL, of(2, 4.0))
    assert prefills.curve(MODEL, 1).seconds(0, 1000) == pytest.approx(8.0)
    assert prefills.curve(MODEL, 2).seconds(0, 1000) == pytest.approx(4.0)
    assert prefills.curve(MODEL) == prefills.curve(MODEL, 4) == prefills.curve(MODEL, 2)
    prefills.observe(MODEL, of(1, 8.0))
    assert prefills.curve(MODEL) == prefills.curve(MODEL, 4) == prefills.curve(MODEL, 1)
    assert prefills.curve(b"another") == PrefillCurve()


def test_native_kv_is_priced_as_its_models_canonical_kv_until_somebody_measures_it():
    canonical = tiny_spec().canonical()
    native = replace(canonical, page_format="pages/1", block_tokens=16)
    prefills = Prefills({spec.fingerprint(): spec for spec in (canonical, native)})
    ours, theirs = canonical.fingerprint(), native.fingerprint()
    assert prefills.curve(theirs) == PrefillCurve()
    prefills.observe(ours, of(2, 4.0))
    assert prefills.curve(theirs, 2) == prefills.curve(ours, 2) != PrefillCurve()
    prefills.observe(theirs, of(2, 8.0))
    assert prefills.curve(theirs, 2).seconds(0, 1000) == pytest.approx(8.0)
    assert prefills.curve(ours, 2).seconds(0, 1000) == pytest.approx(4.0)


POINTS = st.builds(Prefill, st.integers(0, 5000), st.integers(1, 5000), st.floats(1e-3, 10), st.integers(1, 5))


@given(st.lists(st.lists(POINTS, max_size=6), max_size=8))
def test_what_is_remembered_makes_the_same_curves(batches):
    prefills, again = Prefills({}), Prefills({})
    for batch in batches:
        prefills.observe(MODEL, batch)
    again.observe(MODEL, prefills.points(MODEL))
    for ranks in (None, *range(1, 6)):
        assert again.curve(MODEL, ranks) == prefills.curve(MODEL, ranks)
    for ranks in {point.ranks for batch in batches for point in batch}:
        own = [point for batch in batches for point in batch if point.ranks == ranks]
        measured = [PrefillPoint(cached_tokens=p, new_tokens=t, seconds=s) for p, t, s, _ in own]
        assert prefills.curve(MODEL, ranks) == PrefillCurve().fitted(measured)


def test_it_is_bounded():
    prefills = Prefills({})
    prefills.observe(MODEL, of(1, *[1.0] * (POINTS_KEPT + 1)))
    assert len(prefills.points(MODEL)) == POINTS_KEPT
    for ranks in range(2, CURVES_KEPT + 2):
        prefills.observe(MODEL, of(ranks, 1.0))
    assert {point.ranks for point in prefills.points(MODEL)} == set(range(2, CURVES_KEPT + 2))
    assert prefills.curve(MODEL, 1) == prefills.curve(MODEL)


def test_an_attach_into_a_group_is_compared_with_what_the_group_would_take():
    scene = Scene()
    scene.group()
    document = scene.store("a", tokens(1, 2))
    scene.service.measurements.observe_prefill(FINGERPRINT, of(2, 1.0))
    scene.service.measurements.observe_prefill(FINGERPRINT, of(1, 2.0))
    (into_group,), (to_ddr,) = scene.attach(document, "g"), scene.attach(document)
    assert to_ddr.loading.swap.recompute_ns == pytest.approx(2 * into_group.loading.swap.recompute_ns, rel=1e-6)


@pytest.mark.parametrize("bad", [Prefill(-1, 1, 1.0), Prefill(0, 0, 1.0), Prefill(0, 1, 0.0), Prefill(0, 1, 1.0, 0)])
def test_a_prefill_that_cannot_be_is_refused(bad):
    service, effects, _ = tiny_service()
    with pytest.raises(InvalidRequest):
        service.measurements.observe_prefill(tiny_spec().fingerprint(), [Prefill(0, 1, 1.0), bad])
    with pytest.raises(SpecMismatch):
        service.measurements.observe_prefill(b"nobody's", [])
    assert not [order for order in effects.orders if isinstance(order, Write)]


def test_curves_survive_a_restart_and_rows_that_name_no_ranks_are_of_one(tmp_path):
    catalog = Catalog(tmp_path / "catalog")
    catalog.commit([PutPrefills(MODEL, (*of(1, 8.0), *of(2, 4.0)))])
    catalog._database.execute(
        "INSERT INTO prefills VALUES (?, ?)", (b"of old", msgspec.msgpack.encode([(0, 1000, 16.0)]))
    )
    contents = catalog.load()
    catalog.close()
    service, _, _ = tiny_service()
    service.restore((), (), (), (), Measured(prefills=contents.prefills))
    curve = service.planner.prefills.curve
    assert [curve(MODEL, ranks).seconds(0, 1000) for ranks in (1, 2)] == pytest.approx([8.0, 4.0])
    assert curve(b"of old", 1).seconds(0, 1000) == pytest.approx(16.0)
