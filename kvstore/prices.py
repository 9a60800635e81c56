"""Prices: what moving and recomputing KV takes here, by what was measured and by what each move teaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from .calibration import Calibration
from .costs import DEFAULT_LINKS, PrefillCurve
from .ledger import Hop
from .opaque import TOKEN_BYTES, prefilled
from .prefills import Prefills
from .residency import Tier
from .spec import KVSpec
from .state import ExtentRecord

HOPS: Final = (
    Hop(Tier.NVME, Tier.DDR),
    Hop(Tier.DDR, Tier.NVME),
    Hop(Tier.DDR, Tier.HBM),
    Hop(Tier.HBM, Tier.DDR),
)


class Prices:
    """Speeds of the hops, and the models' prefill curves."""

    def __init__(self, specs: Mapping[bytes, KVSpec]) -> None:
        self._specs = specs
        self.prefills = Prefills(specs)
        self.links = {hop: DEFAULT_LINKS[str(hop)] for hop in HOPS}
        self.calibration: Calibration | None = None
        self._reload_ns: dict[int, int] = {}  # by size and tiers, until a link is learned

    def recompute_ns(self, record: ExtentRecord) -> int:
        """Marginal prefill time of the extent's tokens behind what precedes them."""
        extent = record.extent
        return self.prefill_ns(extent.fingerprint, extent.start, extent.stop)

    def prefill_ns(self, fingerprint: bytes, start: int, stop: int, ranks: int | None = None) -> int:
        """Time to compute positions [start, stop) of a document behind those in front of them."""
        spec = self._specs.get(fingerprint)
        tokens = (start, stop) if spec is None else prefilled(spec, start, stop)
        return self.prefills.curve(fingerprint, ranks).marginal_prefill_ns(*tokens)

    def reload_ns(self, record: ExtentRecord, source: Tier, target: Tier) -> int:
        """Predicted time to bring one extent from a tier to a nearer one, hop after hop."""
        size = record.extent.slot_bytes
        key = size << 4 | source << 2 | target
        known = self._reload_ns.get(key)
        if known is None:
            hops = [hop for hop in self.links if hop.source > hop.target and source >= hop.source]
            known = sum(self.links[hop].move_ns(size) for hop in hops if target <= hop.target)
            self._reload_ns[key] = known
        return known

    def recompute_worth(self, token_count: int) -> float:
        """Nanoseconds that the first so many tokens of any document save: by the prior curve, for models differ."""
        return PrefillCurve().marginal_prefill_ns(0, token_count)

    def reload_worth(self, hop: Hop, token_bytes: int = TOKEN_BYTES) -> Callable[[int], float]:
        """The same where a hop would bring them: by what it takes now, whenever that is asked."""

        def worth(token_count: int) -> float:
            return self.links[hop].move_ns(token_count * token_bytes) if token_count else 0.0

        return worth

    def calibrate(self, calibration: Calibration) -> None:
        """Predict by these measurements; hops that they do not name keep what was learned."""
        self.calibration = calibration
        measured = calibration.links()
        self.links = {hop: measured.get(str(hop), link) for hop, link in self.links.items()}
        self._reload_ns.clear()

    def learn(self, hop: Hop, size_bytes: int, elapsed_ns: int) -> None:
        """A hop of a whole load, or a single move, corrects the hop's predicted speed."""
        self.links[hop] = self.links[hop].observed(size_bytes, elapsed_ns)
        self._reload_ns.clear()

    def predicted_ns(self, sizes: Mapping[Hop, int], move_bytes: int) -> int:
        """Predicted time of a load that moves these bytes over these hops, in moves of `move_bytes`.

        Hops overlap, so the slowest counts whole, and of each other hop one move: the first on its way in, or the last.
        """
        whole = {hop: self.links[hop].move_ns(size) for hop, size in sizes.items() if size}
        if not whole:
            return 0
        slowest = max(whole, key=lambda hop: whole[hop])
        others = sum(self.links[hop].move_ns(min(sizes[hop], move_bytes)) for hop in whole if hop is not slowest)
        return whole[slowest] + others
