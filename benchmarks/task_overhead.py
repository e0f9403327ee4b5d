"""What does a chunk cost when there is next to nothing to do in it?"""

from __future__ import annotations

import dask.array as da
import measure

import shmarray as sa

SHAPE, CHUNKS = (2_000, 1_000), (10, 10)
COUNT = 20_000
FEW = {"dask threads": 1}

measure.start(f"{COUNT:,} chunks of 100 float64 each; times are per chunk")

z = sa.ones(SHAPE, chunks=CHUNKS).persist()
lazy = da.ones(SHAPE, chunks=CHUNKS)
assert z.npartitions == lazy.npartitions == COUNT


def trivial(block):
    return block


print("(z + 1).sum():")
measure.table(
    measure.in_turn(
        {"shmarray": lambda: (z + 1).sum().compute(), "dask threads": lambda: (lazy + 1).sum().compute(scheduler="threads")},
        few=FEW,
    ),
    per=COUNT,
)
print("map_blocks of a function that returns its block:")
measure.table(
    measure.in_turn(
        {
            "shmarray": lambda: z.map_blocks(trivial, dtype=float).compute(),
            "dask threads": lambda: lazy.map_blocks(trivial, dtype=float).compute(scheduler="threads"),
        },
        few=FEW,
    ),
    per=COUNT,
)
