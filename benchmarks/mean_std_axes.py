"""How fast are mean and standard deviation along each axis of a stored array of 320 MB?"""

from __future__ import annotations

import dask
import dask.array as da
import measure
import numpy as np

import shmarray as sa

measure.start("mean and std of one array, 20,000 x 2,000 float64, stored")

x = np.random.default_rng(0).random((20_000, 2_000))
sa_x = sa.array(x)
da_x = da.from_array(x, chunks=(1_000, 2_000), name=False)

for axis in (0, 1, None):
    print(f"axis={axis}:")
    measure.table(
        measure.in_turn(
            {
                "shmarray": lambda axis=axis: sa.compute(sa_x.mean(axis=axis), sa_x.std(axis=axis)),
                "NumPy": lambda axis=axis: (x.mean(axis=axis), x.std(axis=axis)),
                "dask threads": lambda axis=axis: dask.compute(da_x.mean(axis=axis), da_x.std(axis=axis), scheduler="threads"),
            },
            rounds=5,
        )
    )
