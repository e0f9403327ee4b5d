"""How does map_blocks scale when the function is a loop in Python, which holds the interpreter's lock?"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import dask.array as da
import measure
import numpy as np

import shmarray as sa

BLOCKS = 32


def collatz(block):
    """Return the number of steps from each element down to 1."""
    steps = np.zeros(block.shape, np.int64)
    for k, n in enumerate(block.tolist()):
        while n != 1:
            n = n // 2 if n % 2 == 0 else 3 * n + 1
            steps[k] += 1
    return steps


# dask's process pool starts this file anew in each of its processes, hence the guard; shmarray needs none.
if __name__ == "__main__":
    measure.start(f"map_blocks of a Python loop over {BLOCKS} chunks of 1,000 integers")
    values = np.arange(1, BLOCKS * 1_000 + 1)
    stored = sa.array(values).rechunk(1_000)
    lazy = da.from_array(values, chunks=1_000)
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"))  # warm, as shmarray's
    measure.table(
        measure.in_turn(
            {
                "shmarray": lambda: stored.map_blocks(collatz, dtype=np.int64).compute(),
                "one call of the function": lambda: collatz(values),
                "dask threads": lambda: lazy.map_blocks(collatz, dtype=np.int64).compute(scheduler="threads"),
                "dask processes": lambda: lazy.map_blocks(collatz, dtype=np.int64).compute(scheduler="processes", pool=pool),
            },
            rounds=5,
        )
    )
