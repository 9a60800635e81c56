"""Ages, hazards and the index: formulas against plain loops, and learning of known processes."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from holdfast.eviction import hazard as hazard_module
from holdfast.eviction.ages import BINS, NEVER_NS, STARTS_SECONDS, STOPS_NS, WIDTHS_SECONDS, age_bin, leaves_bin_ns
from holdfast.eviction.features import FEATURES, LEVELS, RELATIVE, TERMS, UNKNOWN
from holdfast.eviction.gittins import LEAST_SHARE, indices, reuse_probability, spans_seconds
from holdfast.eviction.hazard import CAUTION, CAUTION_OF_AGE, RATE, ROWS, Hazards, Memory, Records, cells
from hypothesis import given, settings
from hypothesis import strategies as st

ages = st.integers(0, 10**15)


@settings(deadline=None)
@given(age_ns=ages)
def test_an_age_is_in_the_bin_that_starts_before_and_ends_after_it(age_ns):
    found = age_bin(age_ns)
    assert (found == 0) == (age_ns < 5e8)
    assert STARTS_SECONDS[found] <= age_ns / 1e9
    assert age_ns < leaves_bin_ns(0, found)
    assert leaves_bin_ns(0, BINS - 1) == NEVER_NS
    assert age_bin(STOPS_NS[min(found, BINS - 2)]) == min(found, BINS - 2) + 1


def naive_index(logits, age_ns):
    """The formula, bin by bin; and the chance of a use within a horizon on the way."""
    start, alive, used, waited, best = age_bin(age_ns), 1.0, 0.0, 0.0, 0.0
    for index in range(start, BINS):
        rate = math.log(1 + math.exp(logits[index])) / WIDTHS_SECONDS[index]
        left = WIDTHS_SECONDS[index]
        if index == start:
            left = max(LEAST_SHARE * left, STARTS_SECONDS[index] + left - age_ns / 1e9)
        use = 1 - math.exp(-rate * left)
        used += alive * use
        waited += alive * use / rate
        alive *= 1 - use
        best = max(best, used / waited)
    return best


@settings(deadline=None)
@given(seed=st.integers(0, 99), found=st.lists(st.one_of(ages, st.sampled_from(STOPS_NS)), min_size=1, max_size=5))
def test_the_index_is_the_best_rate_over_all_stops(seed, found):
    logits = np.random.default_rng(seed).normal(-3, 2, (len(found), BINS))
    expected = [naive_index(line, age_ns) for line, age_ns in zip(logits, found, strict=True)]
    assert indices(logits, spans_seconds(found)) == pytest.approx(expected, rel=1e-6)


def test_a_constant_rate_is_its_own_index_at_any_age():
    rate = 1 / 300
    logits = np.log(np.expm1(rate * WIDTHS_SECONDS).clip(max=1e300))[None, :].clip(max=600)
    for age_ns in (0, 10**9, 10**11):
        spans = spans_seconds([age_ns])
        assert indices(logits, spans)[0] == pytest.approx(rate, rel=1e-3)
        assert reuse_probability(logits, spans, 300.0) == pytest.approx(1 - math.exp(-1), rel=1e-3)


def test_what_is_certain_and_what_is_impossible_are_finite():
    for logit in (-800.0, 800.0):
        found = indices(np.full((1, BINS), logit), spans_seconds([0]))
        assert np.isfinite(found).all()
        assert (found >= 0).all()


def levels(**given_levels):
    unsaid = [0] * len(FEATURES) + [UNKNOWN] * len(RELATIVE)
    return bytes(given_levels.get(term.name, level) for term, level in zip(TERMS, unsaid, strict=True))


def chances(hazards, one):
    """Of a use in each bin."""
    return 1 / (1 + np.exp(-hazards.logits(cells([one]))[0]))


def test_hazards_of_two_classes_are_learned_apart_and_age_by_age():
    """One comes back in bin 3 three times of four, the other never: seen together, in batches."""
    hazards, quick, dead = Hazards(), levels(gap=3), levels(gap=9)
    for _ in range(100):
        records = Records()
        for number in range(8):
            records.add(dead, 0, 9, used=0)
            if number % 4:
                records.add(quick, 0, 3, used=1)
            else:
                records.add(quick, 0, 9, used=0)
        hazards.learn(records)
    assert chances(hazards, quick)[3] == pytest.approx(0.75, abs=0.1)
    assert chances(hazards, quick)[[0, 1, 2, 4, 5, 6]].max() < 0.1
    assert chances(hazards, dead)[:10].max() < 0.05
    now = spans_seconds([0, 0, STOPS_NS[4]])
    fresh, never, late = indices(hazards.logits(cells([quick, dead, quick])), now)
    assert fresh > 10 * never
    assert fresh > 5 * late, "its time has passed"


def test_a_batch_is_one_step_of_adagrad_on_the_log_loss_of_its_records():
    """Against a plain loop, with tables that are looked up by feature, level and bin."""
    hazards, records = Hazards(), Records()
    for one, first, last, used in (
        (levels(turn=2), 1, 3, 1),
        (levels(turn=2, gap=4, age_to_gap=1), 0, 2, 0),
        (levels(age_to_gap=2, age_to_mean_gap=0), 1, 3, 1),
        (levels(turn=5, uses=1), 2, 2, 1),
    ):
        records.add(one, first, last, used=used)
    old_curves, old_lifts = hazards._curves.copy(), hazards._lifts.copy()
    hazards.learn(records)
    curves, lifts, diagonals = Counter(), Counter(), Counter()  # sums of gradients by what is looked up
    for one, first, last, used in zip(records.levels, records.first, records.last, records.used, strict=True):
        for index in range(first, last + 1):
            rows = cells([one])[0]
            logit = sum(old_curves[row, index] + old_lifts[row] for row in rows)
            gradient = 1 / (1 + math.exp(-logit)) - (used and index == last)
            for number, expected in enumerate(one[len(FEATURES) :]):
                if expected != UNKNOWN:
                    diagonals[number, index - expected] += gradient
            for row in rows[: len(FEATURES)]:
                curves[row, index] += gradient
                lifts[row] += gradient
    age = [feature.name for feature in FEATURES].index("age") * LEVELS
    for (row, index), total in curves.items():
        start = CAUTION_OF_AGE if row == age else CAUTION
        old_curves[row, index] -= RATE * total / math.sqrt(start + total**2)
    for row, total in lifts.items():
        old_lifts[row] -= RATE * total / math.sqrt(CAUTION + total**2) if row != age else 0.0
    for (number, beyond), total in diagonals.items():
        for expected in range(BINS):
            if 0 <= expected + beyond < BINS:
                row = cells([levels(**{RELATIVE[number].name: expected})])[0][len(FEATURES) + number]
                old_curves[row, expected + beyond] -= RATE * total / math.sqrt(CAUTION + total**2)
    assert diagonals
    assert hazards._curves == pytest.approx(old_curves)
    assert hazards._lifts == pytest.approx(old_lifts)


def test_old_records_are_recalled_with_new_ones_until_they_are_too_old(monkeypatch):
    monkeypatch.setattr(hazard_module, "MEMORY", 6)
    memory, width = Memory(), len(TERMS) + 3
    batches = [np.full((4, width), number, np.uint8) for number in range(9)]
    assert memory.recall(batches[0]).tolist() == batches[0].tolist(), "there is nothing old yet"
    seen = set()
    for number in range(1, 9):
        found = memory.recall(batches[number])
        assert found[:4].tolist() == batches[number].tolist()
        seen |= {number - int(one) for one in found[4:, 0]}
        assert len(found) == 8
    assert seen == {1, 2}, "six lines are the last batch and half of the one before"


def test_parts_add_up_to_the_log_odds():
    hazards, one = Hazards(), levels(turn=3, uses=2, age_to_gap=7)
    parts = hazards.parts(one, 5)
    assert len(parts) == len(TERMS)
    assert sum(parts) == pytest.approx(hazards.logits(cells([one]))[0, 5])


def test_features_fit_their_tables():
    assert len({term.name for term in TERMS}) == len(TERMS)
    rows = cells([bytes([LEVELS - 1] * len(FEATURES) + [UNKNOWN] * len(RELATIVE))])[0]
    assert max(rows[: len(FEATURES)]) == len(FEATURES) * LEVELS - 1
    assert max(rows) == ROWS - 1


def test_what_is_learned_of_one_pace_is_known_of_all():
    """They come back when they are twice as old as their gap was. The same is expected of one that nobody had."""
    hazards = Hazards()
    for _ in range(400):
        records = Records()
        for gap in (4, 8, 12):
            records.add(levels(age_to_gap=gap), 0, gap + 2, used=1)
        hazards.learn(records)
    stranger = chances(hazards, levels(age_to_gap=20))
    assert stranger[22] > 2 * max(*stranger[18:22], *stranger[23:27])
