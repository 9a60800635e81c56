"""An engine's view: read what is known of a prompt's KV, compute the rest, store it without a name.

Run: python examples/reuse_a_prefix.py [DATA_DIR]     (needs a running daemon: `holdfast serve`)
"""

import sys

import numpy as np

import holdfast

group = holdfast.LayerGroup(layers=(0, 1, 2, 3), kv_heads=2, key_dim=64, value_dim=64)
spec = holdfast.KVSpec(
    groups=(group,), dtype="float32", model="example-model@1", vocabulary_size=256, extent_blocks=8
)  # extents of 8 blocks, 512 tokens


def prefill(tokens: list[int]) -> np.ndarray:
    """What stands here for a model: one layer's keys, or values, [kv heads, tokens, dim]."""
    return np.tile(np.array(tokens, np.float32)[:, None], (2, 1, 64))


with holdfast.connect(data_dir=sys.argv[1] if len(sys.argv) > 1 else None) as store:
    document = list(b"Optics is the study of light. " * 100)
    for question in (b"What is it about?", b"And who wrote it?"):
        tokens = document + list(question)
        kv = {layer: np.empty((2, 2, len(tokens), 64), np.float32) for layer in group.layers}
        known = 0
        if store.lookup(spec, tokens).token_count:
            with store.attach_prefix(spec, tokens) as prefix:
                known = prefix.tokens[1]
                for layer in prefix.layers():
                    layer.copy_into(*kv[layer.index][:, :, :known])
        for layer in group.layers:  # an engine computes these behind what it has read
            kv[layer][:, :, known:] = prefill(tokens[known:])
        with store.ingest(None, spec, tokens) as writer:
            for start, stop in writer.missing:
                for layer in group.layers:
                    writer.write(layer, start, *kv[layer][:, :, start:stop])
        assert all((both == prefill(tokens)).all() for both in kv.values())
        print(f"{known} of {len(tokens)} tokens were known")
