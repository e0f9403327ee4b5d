"""What does it cost to have stored data as NumPy, or in another order or grid?"""

from __future__ import annotations

import dask.array as da
import measure
import numpy as np

import shmarray as sa

SHAPE = (32_000, 2_000)

measure.start("a stored array of 512 MB, read as a whole, rechunked, transposed, sliced")

x = sa.random.default_rng(0).random(SHAPE).persist()
lazy = da.from_array(np.array(x), chunks=(1_000, 2_000), name=False).persist(scheduler="threads")

VIEWS = {  # the same for both
    "all of it": lambda x: x,
    "rechunk((-1, 100))": lambda x: x.rechunk((-1, 100)),
    "T": lambda x: x.T,
    "[1000:, ::2]": lambda x: x[1000:, ::2],
}
whole = np.asarray(x)

print("np.asarray of ...")
for name, view in VIEWS.items():
    copied = 0 if np.shares_memory(np.asarray(view(x)), whole) else view(x).nbytes
    print(f"{name}  (shmarray copies {copied} bytes):")
    measure.table(
        measure.in_turn(
            {
                "shmarray": lambda view=view: np.asarray(view(x)),
                "shmarray compute()": lambda view=view: view(x).compute(),
                "dask threads": lambda view=view: view(lazy).compute(scheduler="threads"),
            },
            rounds=5,
        )
    )
