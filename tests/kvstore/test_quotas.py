"""Quotas: fair shares, usage, and who may lose to whom, each against a naive account of the same."""

import pytest
from holdfast.kvstore.contest import Contest
from holdfast.kvstore.quotas import Quota, Quotas, Usage, fair_shares
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.sections import TenantConfig
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = ("a", "b", "c", "d")
CAPACITY = 100


def tables(guaranteed, maximum):
    """DDR quotas by name."""
    return {
        name: TenantConfig(ddr_guaranteed_bytes=guaranteed[name], ddr_maximum_bytes=maximum[name])
        for name in guaranteed
    }


@st.composite
def quotas_of(draw):
    """Quotas of four tenants, whose guarantees fit."""
    left, guaranteed, maximum = CAPACITY, {}, {}
    for name in NAMES:
        guaranteed[name] = draw(st.integers(0, left))
        left -= guaranteed[name]
        maximum[name] = draw(st.none() | st.integers(guaranteed[name], CAPACITY))
    return Quotas(tables(guaranteed, maximum))


def naive_shares(capacity, wants, quotas):
    """One byte after the other to who has least beyond its guarantee and wants more."""
    wanted = {name: min(want, quotas[name].most(capacity)) for name, want in wants.items()}
    given_bytes = {name: min(want, quotas[name].guaranteed_bytes) for name, want in wanted.items()}
    beyond = dict.fromkeys(wanted, 0)
    for _ in range(capacity - sum(given_bytes.values())):
        hungry = [name for name in wanted if given_bytes[name] + beyond[name] < wanted[name]]
        if not hungry:
            break
        beyond[min(hungry, key=lambda name: beyond[name])] += 1
    return {name: given_bytes[name] + beyond[name] for name in wanted}


@given(quotas_of(), st.fixed_dictionaries({name: st.integers(0, 2 * CAPACITY) for name in NAMES}))
def test_fair_shares_are_those_of_pouring_byte_by_byte(quotas, wants):
    of = {name: quotas.of(name, Tier.DDR) for name in NAMES}
    shares = fair_shares(CAPACITY, wants, of)
    poured = naive_shares(CAPACITY, wants, of)
    wanted = sum(min(want, of[name].most(CAPACITY)) for name, want in wants.items())
    assert min(CAPACITY, wanted) - len(NAMES) < sum(shares.values()) <= CAPACITY
    for name in NAMES:
        assert poured[name] - 1 <= shares[name] <= poured[name]
        assert shares[name] >= min(wants[name], of[name].guaranteed_bytes)


def test_what_is_guaranteed_and_not_used_is_lent():
    quotas = Quotas(tables({"a": 80, "b": 0}, {"a": None, "b": None}))
    of = {name: quotas.of(name, Tier.DDR) for name in "ab"}
    assert fair_shares(CAPACITY, {"a": 10, "b": 200}, of) == {"a": 10, "b": 90}
    assert fair_shares(CAPACITY, {"a": 200, "b": 200}, of) == {"a": 90, "b": 10}


def test_quotas_of_a_tenant_or_of_everybody_else():
    quotas = Quotas({"a": TenantConfig(ddr_guaranteed_bytes=5), "*": TenantConfig(nvme_maximum_bytes=7)})
    assert quotas.of("a", Tier.DDR) == Quota(5, None)
    assert quotas.of("a", Tier.NVME) == Quota()
    assert quotas.of("b", Tier.NVME) == Quota(0, 7)
    assert quotas.of("b", Tier.HBM) == Quota()
    assert quotas
    assert not Quotas({})


@given(st.lists(st.tuples(st.sampled_from(Tier), st.sampled_from(NAMES), st.integers(1, 9)), max_size=30), st.data())
def test_usage_is_what_a_recount_finds(copies, data):
    usage, here = Usage(), []
    for copy in copies:
        usage.came(*copy)
        here.append(copy)
        if data.draw(st.booleans()):
            usage.left(*here.pop(data.draw(st.integers(0, len(here) - 1))))
    for tier in Tier:
        counted = {name: sum(size for t, n, size in here if (t, n) == (tier, name)) for name in NAMES}
        assert usage.of(tier) == {name: size for name, size in counted.items() if size}
        assert all(usage.used(tier, name) == size for name, size in counted.items())


def test_nobody_has_less_than_nothing():
    usage = Usage()
    usage.came(Tier.DDR, "a", 1)
    with pytest.raises(AssertionError, match="less than nothing"):
        usage.left(Tier.DDR, "a", 2)


class Cache:
    """One tier of single bytes, which evicts by contest and else at random: what the planner does, and no more."""

    def __init__(self, quotas, pick):
        self.quotas = quotas
        self.held = dict.fromkeys(NAMES, 0)
        self.pick = pick

    def ask(self, tenant, wanted):
        """True when it was granted; who lost is taken out, or nobody is."""
        held = {name: size for name, size in self.held.items() if size}
        contest = Contest(self.quotas, Tier.DDR, CAPACITY, held, tenant, wanted)
        for permit in contest.permits():
            lost = self.choose(contest, permit, wanted)
            if lost is not None:
                for name in lost:
                    self.held[name] -= 1
                self.held[tenant] += wanted
                return True
        return False

    def choose(self, contest, permit, wanted):
        left, lost, refused = dict(self.held), [], set()
        while sum(left.values()) + wanted > CAPACITY or not contest.met((name, 1) for name in lost):
            some = [name for name in NAMES if left[name] and name not in refused]
            if not some:
                return None
            name = self.pick(some)
            if permit(name, 1):
                left[name] -= 1
                lost.append(name)
            else:
                refused.add(name)
        return lost


@settings(max_examples=200, deadline=None)
@given(quotas_of(), st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 60)), max_size=12), st.randoms())
def test_no_sequence_of_demands_breaks_a_guarantee_or_a_maximum(quotas, demands, random):
    cache = Cache(quotas, random.choice)
    for tenant, wanted in demands:
        before = dict(cache.held)
        quota = quotas.of(tenant, Tier.DDR)
        granted = cache.ask(tenant, wanted)
        assert sum(cache.held.values()) <= CAPACITY
        assert granted or cache.held == before, "a refusal changes nothing"
        assert cache.held[tenant] <= quota.most(CAPACITY)
        for name in NAMES:
            kept = min(before[name], quotas.of(name, Tier.DDR).guaranteed_bytes)
            assert name == tenant or cache.held[name] >= kept, "a guarantee was broken for another's demand"
        if before[tenant] + wanted <= quota.guaranteed_bytes:
            assert granted, "nothing is leased or pinned, so what is guaranteed can be had"


@given(st.permutations([60, 30, 10]), st.integers(1, 30), st.randoms())
def test_the_largest_beyond_its_guarantee_loses_first(sizes, wanted, random):
    cache = Cache(Quotas({"*": TenantConfig()}), random.choice)
    for name, size in zip("abc", sizes, strict=True):
        assert cache.ask(name, size)
    shares = fair_shares(CAPACITY, {**cache.held, "d": wanted}, dict.fromkeys(NAMES, Quota()))
    before = dict(cache.held)
    assert cache.ask("d", wanted)
    for name in "abc":
        assert cache.held[name] == before[name] or cache.held[name] >= shares[name]
        if before[name] <= shares[name]:
            assert cache.held[name] == before[name], "who is within its fair share has lost something"
    assert cache.held["d"] == wanted
