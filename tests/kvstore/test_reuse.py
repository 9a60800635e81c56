"""Expected reuse: what is decided, and what is learned of tenants."""

from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.reuse import DOCUMENTS_KEPT, TENANTS_KEPT, Comebacks, Ghosts, Stake, decide
from hypothesis import given
from hypothesis import strategies as st

PATIENCE_NS = 1000
RATES = st.floats(0, 1)
STAKES = st.lists(st.builds(Stake, st.booleans(), st.integers(-(10**9), 10**12), st.integers(0, 10**9)), max_size=20)


def through(stakes, rate):
    return decide(stakes, rate).policy is WritePolicy.THROUGH


def test_what_is_expected_back_is_written_and_what_is_not_is_kept_until_evicted():
    assert through([Stake(known=False, saved_ns=100, price_ns=60)], 0.7)
    assert not through([Stake(known=False, saved_ns=100, price_ns=60)], 0.5)
    assert through([Stake(known=True, saved_ns=100, price_ns=60)], 0.0), "it came back"
    assert not through([Stake(known=True, saved_ns=-100, price_ns=60)], 1.0), "recomputing is faster than reading"
    assert through([], 0.0), "nothing to write"
    assert decide([Stake(known=False, saved_ns=2 * 10**9, price_ns=10**9)], 0.25).reason == (
        "saves 0.5 s expected at 25% comebacks, costs 1 s to write"
    )


@given(STAKES, RATES, RATES)
def test_a_higher_rate_never_speaks_against_writing(stakes, one, other):
    low, high = sorted((one, other))
    assert through(stakes, high) >= through(stakes, low)


@given(STAKES, RATES, st.integers(0, 19))
def test_having_been_here_never_speaks_against_writing(stakes, rate, index):
    known = [stake._replace(known=stake.known or i == index) for i, stake in enumerate(stakes)]
    assert through(known, rate) >= through(stakes, rate)


class Tenants:
    """Comebacks, and documents with numbers for names."""

    def __init__(self):
        self.comebacks = Comebacks(PATIENCE_NS)
        self.now_ns = 0

    def commit(self, number, tenant="t"):
        self.comebacks.committed(DocumentId(tenant, str(number)), self.now_ns)

    def use(self, number, tenant="t"):
        self.comebacks.returned(DocumentId(tenant, str(number)), self.now_ns)

    def rate(self, tenant="t"):
        return self.comebacks.rate(tenant, self.now_ns)


def test_an_unknown_tenant_is_expected_back_and_so_is_one_whose_documents_are_young():
    tenants = Tenants()
    assert tenants.rate() == 1.0
    for number in range(50):
        tenants.commit(number)
    assert tenants.rate() == 1.0


def test_the_rate_follows_what_came_back():
    """Half came back, half did not in time; then none, then all."""
    tenants = Tenants()
    for number in range(100):
        tenants.commit(number)
        if number % 2:
            tenants.use(number)
            tenants.use(number)  # counts once
    tenants.now_ns += PATIENCE_NS + 1
    assert 0.2 < tenants.rate() < 0.6
    for number in range(100, 300):
        tenants.commit(number)
    tenants.now_ns += PATIENCE_NS + 1
    assert tenants.rate() < 0.1
    for number in range(300):
        tenants.commit(number)
        tenants.use(number)
    assert tenants.rate() > 0.9
    tenants.commit(1)
    before = tenants.rate()
    tenants.commit(1)  # ingested again
    assert tenants.rate() > before
    assert tenants.rate("other") == 1.0


def test_memory_is_bounded_and_what_is_pushed_out_did_not_come_back():
    tenants = Tenants()
    for number in range(10 * DOCUMENTS_KEPT):
        tenants.commit(number)
    assert tenants.rate() < 0.1
    for number in range(2 * TENANTS_KEPT):
        tenants.commit(1, f"tenant-{number}")
    assert len(tenants.comebacks._tenants) == TENANTS_KEPT
    assert tenants.rate() == 1.0, "forgotten"


@given(st.lists(st.tuples(st.sampled_from(["commit", "use", "wait"]), st.integers(0, 5)), max_size=60))
def test_a_rate_is_a_share(steps):
    tenants = Tenants()
    for what, number in steps:
        if what == "wait":
            tenants.now_ns += number * 300
        else:
            getattr(tenants, what)(number)
        assert 0 < tenants.rate() <= 1


def test_what_left_last_is_remembered():
    ghosts = Ghosts(2)
    for extent in ("a", "b", "a", "c"):
        ghosts.add(extent)
    assert [extent in ghosts for extent in "abc"] == [True, False, True]
    assert len(ghosts) == 2
