"""shmarray in two minutes: NumPy's names, chunks in shared memory, every core at work."""

from __future__ import annotations

import numpy as np

import shmarray as sa

# Expressions are lazy. Nothing has happened yet, and nothing takes memory:
x = sa.random.default_rng(0).random((4_000, 2_000))
celsius = 40 * x - 10
print(celsius)

# compute() gives NumPy arrays and scalars. Computed together, the two share one pass:
mean, hottest = sa.compute(celsius.mean(), celsius.max())
print(f"mean {mean:.3f}, hottest {hottest:.3f}")

# persist() stores the values in shared memory. Reading them as NumPy copies nothing, and so do views:
stored = celsius.persist()
print(np.asarray(stored)[0, :3], stored.T[:2, ::1000].compute())

# Stored arrays change in place, NumPy functions work on them, and views are views:
stored *= 1.8
stored += 32
north = stored[:2_000]
north[...] = np.maximum(north, 32.0)
print(f"coldest in the north {north.min().compute():.1f}, in the south {stored[2_000:].min().compute():.1f}")

# A chunk as a live NumPy array, locked against all others meanwhile:
with stored.lock((0, 0), "w") as chunk:
    chunk[0, 0] = 451.0
print(stored[0, 0].compute())

# Any function of a chunk, in the worker processes (no __main__ guard needed):
print(stored.rechunk((500, -1)).map_blocks(lambda block: np.sort(block, axis=1)[:, -3:], chunks=(500, 3)).max().compute())
