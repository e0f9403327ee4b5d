"""How fast are histograms, bincount and add.at of many points, in memory, beside NumPy and dask? ``--points``: how many (10,000,000)."""

from __future__ import annotations

import sys

import dask.array as da
import measure
import numpy as np

import shmarray as sa

POINTS = int(sys.argv[sys.argv.index("--points") + 1]) if "--points" in sys.argv else 10_000_000
LIMITS = (-6.0, 6.0)
BINS = 100
LEVELS = 1000

measure.start(f"accumulators, {POINTS:,} points of float64, stored")

rng = np.random.default_rng(0)
x, y = rng.standard_normal(POINTS), rng.standard_normal(POINTS)
w, levels = rng.random(POINTS), rng.integers(0, LEVELS, POINTS)
sa_x, sa_y, sa_w, sa_levels = (sa.array(v) for v in (x, y, w, levels))
da_x, da_y, da_w, da_levels = (da.from_array(v, chunks=1_000_000, name=False) for v in (x, y, w, levels))
cells, sa_cells = np.zeros(LEVELS), sa.zeros(LEVELS).persist()

np.testing.assert_array_equal(sa.histogram2d(sa_x, sa_y, BINS, [LIMITS] * 2)[0], np.histogram2d(x, y, BINS, [LIMITS] * 2)[0])

for name, calls in {
    "histogram2d, 100 x 100 bins": {
        "shmarray": lambda: sa.histogram2d(sa_x, sa_y, BINS, [LIMITS] * 2)[0].compute(),
        "NumPy": lambda: np.histogram2d(x, y, BINS, [LIMITS] * 2)[0],
        "dask threads": lambda: da.histogram2d(da_x, da_y, BINS, [LIMITS] * 2)[0].compute(scheduler="threads"),
    },
    "histogram, 100 bins": {
        "shmarray": lambda: sa.histogram(sa_x, BINS, LIMITS)[0].compute(),
        "NumPy": lambda: np.histogram(x, BINS, LIMITS)[0],
        "dask threads": lambda: da.histogram(da_x, BINS, LIMITS)[0].compute(scheduler="threads"),
    },
    "histogram, 100 bins, range from the data, weights": {
        "shmarray": lambda: sa.histogram(sa_x, BINS, weights=sa_w)[0].compute(),
        "NumPy": lambda: np.histogram(x, BINS, weights=w)[0],
    },
    "bincount, 1000 numbers": {
        "shmarray": lambda: sa.bincount(sa_levels).compute(),
        "NumPy": lambda: np.bincount(levels),
        "dask threads": lambda: da.bincount(da_levels, minlength=LEVELS).compute(scheduler="threads"),
    },
    "add.at, 1000 elements": {
        "shmarray": lambda: (sa.add.at(sa_cells, sa_levels, sa_w), sa_cells.compute())[1],
        "NumPy": lambda: (np.add.at(cells, levels, w), cells)[1],
    },
}.items():
    print(f"{name}:")
    measure.table(measure.in_turn(calls, rounds=3))
