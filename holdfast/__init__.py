"""Holdfast keeps the KV cache of long documents where it pays to keep it.

This package is the front door: it composes the four rooms (`holdfast.kvstore`, `holdfast.eviction`,
`holdfast.ring_attention`, `holdfast.engine_adapter`), holds the public names and the command line,
and is imported by none of them.
"""

__version__ = "0.1.0"
