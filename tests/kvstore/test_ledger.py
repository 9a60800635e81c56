"""The ledger's sums: how many queries each reattach served."""

from holdfast.kvstore.ledger import Hop, HopTime, Ledger, Seen, SwapRecord
from holdfast.kvstore.residency import Tier


def record(number, moved_bytes):
    """An attach that moved so much."""
    swap = SwapRecord(id=number, document="a", group=None, client=1, started_wall_ns=0, token_count=1)
    if moved_bytes:
        swap.hops[Hop(Tier.NVME, Tier.DDR)] = HopTime(size_bytes=moved_bytes)
    return swap


def test_the_amortisation_is_queries_for_each_time_that_bytes_moved():
    """What finds its document near is served by the reattach before it; two reports of one attach are one reattach."""
    ledger = Ledger(8)
    assert ledger.amortisation is None
    moved, near = record(1, 100), record(2, 0)
    for swap, queries in ((moved, 3), (moved, 2), (near, 4)):
        ledger.reported(swap, Seen(1, 1, 1, 5, queries=queries))
    assert (moved.queries, near.queries) == (5, 4)
    assert ledger.amortisation == 9
    ledger.reported(record(3, 7), Seen(1, 1, 1, 5))
    assert ledger.amortisation == 5
