"""Who holds what, and where.

This room knows documents, extents, layouts, tiers, leases, pins and the ledger; it plans moves,
moves the bytes, accounts for them, and serves them through the daemon, its admin API and its
client. It asks `eviction` who should leave. It does not know how attention is computed, what an
engine's pages look like, or torch: HBM lives in rank processes that it commands by message.
"""
