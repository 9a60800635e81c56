"""Many readers in one asyncio program; whoever is cancelled gives its lease back.

Run: python examples/read_async.py [DATA_DIR]     (needs a running daemon: `holdfast serve`)
"""

import asyncio
import sys

import numpy as np

import holdfast

group = holdfast.LayerGroup(layers=(0, 1), kv_heads=2, key_dim=64, value_dim=64)
spec = holdfast.sized(
    holdfast.KVSpec(groups=(group,), dtype="float32", model="example-model@1", vocabulary_size=256, extent_blocks=1)
)


async def write(store: holdfast.AsyncStore, name: str, value: int) -> None:
    """Store a document of one token, many times."""
    async with store.ingest(name, spec, [value] * 500) as writer:
        for start, stop in writer.missing:
            made = np.full((2, stop - start, 64), value, np.float32)
            for layer in group.layers:
                await writer.write(layer, start, made, made)


async def read(store: holdfast.AsyncStore, name: str) -> float:
    """Read it back, layer by layer."""
    async with store.attach(name, spec=spec) as document:
        means = [float(layer.gathered()[0].mean()) async for layer in document.layers()]
    return sum(means) / len(means)


async def main() -> None:
    """All at once."""
    async with holdfast.connect_async(data_dir=sys.argv[1] if len(sys.argv) > 1 else None) as store:
        names = {f"async example {value}": value for value in range(5)}
        await asyncio.gather(*(write(store, name, value) for name, value in names.items()))
        print("means", await asyncio.gather(*(read(store, name) for name in names)))
        await asyncio.gather(*(store.delete(name) for name in names))


asyncio.run(main())
