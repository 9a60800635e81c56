"""A scene: a service of a few extents whose effects end when the test says so, and the words to play it with."""

from dataclasses import replace

from holdfast.kvstore.clock import ManualClock
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.service import Service

from fakes import CLIENT, EXTENT_BYTES, FAR_NS, ManualEffects, tiny_config, tiny_spec

SPEC = tiny_spec()
FINGERPRINT = SPEC.fingerprint()
RANKS = (21, 22)


def tokens(seed, extents):
    """So many full extents of tokens; documents of one seed share their front."""
    return [(seed * 101 + i * 7) % 1000 for i in range(32 * extents)]


def named(name):
    """The document of "[TENANT/]NAME"."""
    tenant, _, name = name.rpartition("/")
    return DocumentId(tenant or "t", name)


def secret(tenant):
    """The tenant's."""
    return bytes(32) if tenant == "t" else tenant.encode().ljust(32)


class Scene:
    """A service with room for so many extents in DDR and on NVMe."""

    def __init__(self, ddr=8, nvme=8, tenants=None, ddr_marks=(1, 1), nvme_marks=(1, 1), **limits):
        config = tiny_config(**{f"limits__{key}": str(value) for key, value in limits.items()})
        tiers = {
            "ddr": replace(config.ddr, capacity_bytes=ddr * EXTENT_BYTES, slab_bytes=EXTENT_BYTES * 2),
            "nvme": replace(config.nvme, capacity_bytes=nvme * EXTENT_BYTES, segment_bytes=EXTENT_BYTES * 2),
        }
        for tier, (high, low) in (("ddr", ddr_marks), ("nvme", nvme_marks)):
            tiers[tier] = replace(tiers[tier], high_watermark=high, low_watermark=low)
        self.config = replace(config, tenants=tenants or {}, **tiers)
        self.clock = ManualClock()
        self.effects = ManualEffects()
        self.service = Service(self.config, self.clock, self.effects, secret)
        self.service.register_spec(SPEC)
        self.settle()

    @property
    def state(self):
        return self.service.state

    def settle(self):
        """All that is under way ends well."""
        while self.effects.orders:
            self.end(self.effects.orders[0])

    def end(self, order, error=None):
        """This order ends."""
        if error is None:
            self.effects.complete(self.service, order)
        else:
            self.effects.fail(self.service, order, error)
        self.state.check()

    def pending(self, kind):
        """Orders of that kind."""
        return [order for order in self.effects.orders if isinstance(order, kind)]

    def group(self, rows=160):
        """Two ranks of `rows` token rows."""
        for rank, client in enumerate(RANKS):
            self.service.register_rank(client, "g", rank, 2, 1, FINGERPRINT, rows)

    def begin(self, name, ids, policy=WritePolicy.THROUGH, group=None, deadline_ns=FAR_NS, ttl_seconds=None, **wanted):
        """Open an ingest; returns it and what was heard of it."""
        heard = []
        document = named(name)
        ingest = self.service.begin_ingest(
            CLIENT,
            document,
            FINGERPRINT,
            ids,
            policy,
            group,
            64,
            deadline_ns,
            heard.append,
            ttl_seconds=ttl_seconds,
            **wanted,
        )
        self.state.check()
        return ingest, heard

    def commit(self, ingest):
        """Returns what will be heard of the commit."""
        heard = []
        self.service.commit_ingest(CLIENT, ingest.id, heard.append)
        self.state.check()
        return heard

    def store(self, name, ids, policy=WritePolicy.THROUGH, group=None, ttl_seconds=None, **wanted):
        """A committed document, everything settled."""
        ingest, _ = self.begin(name, ids, policy, group, ttl_seconds=ttl_seconds, **wanted)
        self.settle()
        heard = self.commit(ingest)
        self.settle()
        assert heard == [ingest.document]
        return ingest.document.id

    def attach(self, document, group=None, client=CLIENT, deadline_ns=FAR_NS, layout=None, tokens=None):
        """Ask for a document; returns what was heard."""
        heard = []
        self.service.attach(client, document, FINGERPRINT, group, layout, deadline_ns, heard.append, tokens)
        self.state.check()
        return heard

    def detach(self, attach):
        """End a lease."""
        self.service.detach(attach.lease.owner, attach.lease.id)
        self.state.check()

    def evict(self, document, tier, size_bytes=0):
        """Take it out of a tier, and let that happen."""
        heard = []
        plan = self.service.evict(document, tier, size_bytes, FAR_NS, heard.append)
        self.settle()
        assert heard == [None]
        return plan

    def tiers(self, document):
        """Tiers of each extent's copies outside HBM."""
        extents = self.state.documents[document].document.extents
        return [{copy.tier for copy in self.state.extents[e].placements() if copy.readable} for e in extents]

    def empty(self):
        """Nothing is held or taken."""
        used = self.state.used_bytes()
        return (
            not +used and not self.state.private and not self.state.leases and not self.service.store.orders_in_flight
        )


def rows(scene):
    """What the catalog would hold."""
    found = [r for r in scene.state.extents.values() if r.cataloged]
    extents = [(r.extent, r.nvme.slot) for r in found]
    documents = [owner.document for owner in scene.state.documents.values() if owner.durable]
    return [SPEC], extents, documents, scene.state.pins.all()
