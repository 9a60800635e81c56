"""Holdfast inside an engine's process.

This room knows sessions, page codecs and the hooks of each engine; it translates between an
engine's KV pages and extents, and makes sure that a cache in trouble never takes its engine down.
It uses `kvstore` through its client, and `ring_attention` for the runner. It does not know how
residency is decided, where bytes live, or who will be evicted.
"""
