"""How fast is a chain of operations that ends in a mean, over two stored arrays of 320 MB?"""

from __future__ import annotations

import dask.array as da
import measure
import numexpr
import numpy as np

import shmarray as sa

measure.start("((a*2+b)*(a-b)+a*0.5).mean(), a and b stored, 40 million float64 each")

SHAPE = (20_000, 2_000)
rng = np.random.default_rng(0)
a, b = rng.random(SHAPE), rng.random(SHAPE)
sa_a, sa_b = sa.array(a), sa.array(b)
da_a, da_b = (da.from_array(x, chunks=(1_000, 2_000), name=False) for x in (a, b))  # 16 MB, as shmarray's own


def chain(a, b):
    return ((a * 2 + b) * (a - b) + a * 0.5).mean()


measure.table(
    measure.in_turn(
        {
            "shmarray": lambda: chain(sa_a, sa_b).compute(),
            "NumPy": lambda: chain(a, b),
            "dask threads": lambda: chain(da_a, da_b).compute(scheduler="threads"),
            "numexpr": lambda: numexpr.evaluate("(a*2+b)*(a-b)+a*0.5").mean(),
        },
        rounds=9,
    )
)
