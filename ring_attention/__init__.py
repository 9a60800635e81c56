"""Context-parallel attention over shards held by ranks.

This room knows kernels, communicators, the model and the runner: exact attention over KV that is
spread unevenly over ranks, merged by log-sum-exp. It takes layouts and byte-range copies from
`kvstore`, and is the only room that imports torch. It does not know tiers, eviction, pins,
engines or the daemon's state.
"""

from importlib.util import find_spec

from ..kvstore.errors import MissingExtra

if find_spec("torch") is None:
    raise MissingExtra("ring attention needs torch: pip install 'holdfast[runner]'")
