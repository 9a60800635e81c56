"""LMCache's hook: an L2 adapter of `lmcache server`, over opaque objects."""
