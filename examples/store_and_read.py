"""Store a document's KV as arrays, read it back layer by layer. Needs a running daemon: `holdfast serve`.

Run: python examples/store_and_read.py [DATA_DIR]
"""

import sys

import numpy as np

import holdfast

spec = holdfast.sized(
    holdfast.KVSpec(
        groups=(holdfast.LayerGroup(layers=tuple(range(4)), kv_heads=2, key_dim=64, value_dim=64),),
        dtype="float32",
        model="example-model@1",
        vocabulary_size=256,
        extent_blocks=1,
    )
)
tokens = list(b"A long document, prefilled once and questioned many times. " * 40)
rng = np.random.default_rng(0)
made = {layer: rng.standard_normal((2, 2, len(tokens), 64), dtype=np.float32) for layer in range(4)}

with holdfast.connect(data_dir=sys.argv[1] if len(sys.argv) > 1 else None) as store:
    with store.ingest("example", spec, tokens) as writer:
        for start, stop in writer.missing:
            for layer, (key, value) in made.items():
                writer.write(layer, start, key[:, start:stop], value[:, start:stop])
    print("stored", store.document("example").resident_bytes)

    store.free("example")  # down to NVMe
    with store.attach("example", spec=spec) as document:
        for layer in document.layers():
            key, value = layer.gathered()
            assert np.array_equal(key, made[layer.index][0])
            assert np.array_equal(value, made[layer.index][1])
            print("layer", layer.index, "is the same, from", len(layer.pieces), "extents")
    store.delete("example")
