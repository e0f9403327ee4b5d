"""What does it cost to save 1 GB as a checkpoint and to load it, beside np.save and np.load?

np.save leaves the bytes in the page cache, a checkpoint has them on the disk when it returns, with checksums; so np.save is
measured with and without fsync. What is loaded was written just before, and comes from the page cache; a checkpoint is compared
with its checksums as it is read. The directory is the first argument, or the current one: say one on a disk.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

import measure
import numpy as np

import shmarray as sa

SHAPE = (125, 1000, 1000)  # of float64: 1 GB
ROUNDS = 5

measure.start("saving and loading 1 GB")
directory = tempfile.mkdtemp(dir=sys.argv[1] if sys.argv[1:] else ".")
file = os.path.join(directory, "x.npy")
x = sa.random.default_rng(0).random(SHAPE).persist()
values = np.array(x)


def numpy_save(sync: bool) -> None:
    with open(file, "wb") as opened:
        np.save(opened, values)
        opened.flush()
        if sync:
            os.fsync(opened.fileno())


try:
    print("saving:")
    cases = {
        "shmarray": lambda: sa.save_checkpoint(directory, 1, x=x),
        "np.save": lambda: numpy_save(False),
        "np.save, fsync": lambda: numpy_save(True),
    }
    measure.table(measure.in_turn(cases, rounds=ROUNDS, agree=False))
    found = sa.load_checkpoint(directory)
    assert (found["x"] == x).all().compute()
    del found
    print("loading:")
    measure.table(
        measure.in_turn({"shmarray": lambda: sa.load_checkpoint(directory), "np.load": lambda: np.load(file)}, rounds=ROUNDS, agree=False)
    )
finally:
    shutil.rmtree(directory)
