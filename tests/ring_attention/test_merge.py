from math import inf

import torch
from holdfast.ring_attention.attend import attend
from holdfast.ring_attention.band import FULL
from holdfast.ring_attention.merge import Accumulator, Partial, merge
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_cases import windowed
from ring_helpers import CPU_FLASH


def partial(seed, tokens=5):
    """A random partial in which some rows saw no key."""
    generator = torch.Generator().manual_seed(seed)
    lse = torch.randn(2, tokens, generator=generator) * 20
    out = torch.randn(2, tokens, 3, generator=generator)
    unseen = torch.rand(2, tokens, generator=generator) < 0.3
    return Partial(out.masked_fill(unseen[..., None], 0.0), lse.masked_fill(unseen, -inf))


def check_same(one, other):
    torch.testing.assert_close(one.out, other.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.lse, other.lse, atol=1e-5, rtol=1e-6)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=6), st.randoms())
@settings(deadline=None, max_examples=50)
def test_any_order_and_any_grouping_give_the_same_result(seeds, random):
    """Merging is associative and commutative."""
    parts = [partial(seed) for seed in seeds]
    whole = merge(parts)
    shuffled = parts.copy()
    random.shuffle(shuffled)
    cut = random.randrange(len(parts)) + 1
    grouped = [merge(shuffled[:cut]), *([merge(shuffled[cut:])] if shuffled[cut:] else [])]
    check_same(merge(grouped), whole)
    assert whole.out.isfinite().all()


def test_identity_changes_no_bit():
    """(0, -inf) is the identity, also against itself."""
    nothing = Accumulator(2, 5, 3, torch.device("cpu")).result()
    part = partial(3)
    for merged in (merge([part, nothing]), merge([nothing, part])):
        assert torch.equal(merged.out, part.out)
        assert torch.equal(merged.lse, part.lse)
    empty = merge([nothing, nothing])
    assert torch.equal(empty.out, nothing.out)
    assert torch.equal(empty.lse, nothing.lse)


def test_far_apart_sums_do_not_overflow():
    """A part with an lse hundreds above the other wins without inf or NaN."""
    low = Partial(torch.ones(1, 1, 1), torch.full((1, 1), -800.0))
    high = Partial(torch.full((1, 1, 1), 2.0), torch.full((1, 1), 800.0))
    merged = merge([low, high])
    assert merged.out.item() == 2.0
    assert merged.lse.item() == 800.0


def test_adding_touches_only_its_queries():
    """The other rows stay as they were."""
    whole, part = partial(1, 5), partial(2, 2)
    total = Accumulator(2, 5, 3, torch.device("cpu"))
    total.add(whole, 0)
    total.add(part, 2)
    got = total.result()
    expected = merge([Partial(whole.out[:, 2:4], whole.lse[:, 2:4]), part])
    check_same(Partial(got.out[:, 2:4], got.lse[:, 2:4]), expected)
    assert torch.equal(got.out[:, [0, 1, 4]], whole.out[:, [0, 1, 4]])


def test_sixty_four_parts_are_as_exact_as_one():
    """Merging adds next to nothing to the kernel's own rounding."""
    generator = torch.Generator().manual_seed(3)
    query, (key, value) = torch.randn(4, 64, 64, generator=generator), torch.randn(2, 2, 4096, 64, generator=generator)
    exact = windowed(query, torch.full((64,), 4096), key, value)
    whole = attend(CPU_FLASH, query, key, value, FULL).out
    parts = [attend(CPU_FLASH, query, k, v, FULL) for k, v in zip(key.split(64, 1), value.split(64, 1), strict=True)]
    assert len(parts) == 64
    assert (merge(parts).out - exact).norm() <= 1.2 * (whole - exact).norm()
