"""The land of the Earth at one kilometre: 933 million cells in shared memory, worked through by all cores.

    python examples/land_mask.py            # all of it: 21600 x 43200 cells
    python examples/land_mask.py --small    # every 20th row and column

The mask is data of the package `global-land-mask` (True where there is ocean). The function `explore` is NumPy code as anybody
would write it. It is called here with an shmarray array, and in a second process with a NumPy array; the answers must agree.
"""

from __future__ import annotations

import importlib.util
import pickle
import resource
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np

import shmarray as sa

SMALL = "--small" in sys.argv
STEP = 20 if SMALL else 1  # take every STEP-th row and column
RADIUS_KM = 6371.0088
DATA = Path(importlib.util.find_spec("global_land_mask").origin).with_name("globe_combined_mask_compressed.npz")
OUTPUT = Path(__file__).parent / "output"


def load():
    """Decompress the mask piece by piece into a stored array: no second copy of it ever exists."""
    with zipfile.ZipFile(DATA) as archive, archive.open("mask.npy") as file:
        np.lib.format.read_magic(file)
        (rows, columns), _, dtype = np.lib.format.read_array_header_1_0(file)
        ocean = sa.empty((rows // STEP, columns // STEP), dtype, chunks=(240 // STEP, -1)).persist()
        for i in range(ocean.numblocks[0]):
            piece = np.frombuffer(file.read(240 * columns), dtype).reshape(240, columns)
            with ocean.lock((i, 0), "w") as view:  # the chunk itself, in shared memory; no one else touches it meanwhile
                view[...] = piece[::STEP, ::STEP]
    return ocean


def load_numpy():
    return np.load(DATA)["mask"][::STEP, ::STEP]


def explore(ocean, seconds):
    """Return the answers, as plain NumPy values. ``ocean`` is an shmarray array or a NumPy array; ``seconds`` takes the times."""
    answers = {}
    rows, columns = ocean.shape
    edges = np.sin(np.radians(np.linspace(90, -90, rows + 1)))
    cell_km2 = RADIUS_KM**2 * (edges[:-1] - edges[1:]) * (2 * np.pi / columns)  # of one cell in each row

    def timed(name, *lazy):
        start = time.perf_counter()
        values = [np.array(x) for x in lazy]  # here the work is done
        seconds[name] = time.perf_counter() - start
        answers[name] = values

    land_km2 = (~ocean).sum(axis=1) * cell_km2
    bands = land_km2.reshape(18, -1).sum(axis=1) / (cell_km2 * columns).reshape(18, -1).sum(axis=1)
    timed("land area, and by latitude", land_km2.sum(), bands)

    middle, north, south, west, east = ocean[1:-1, 1:-1], ocean[:-2, 1:-1], ocean[2:, 1:-1], ocean[1:-1, :-2], ocean[1:-1, 2:]
    coast = ~middle & (north | south | west | east)
    timed("coastline cells", coast.sum())

    cells = rows // 360  # along the side of half a degree
    timed("land in half-degree squares", 1 - ocean.reshape(360, cells, 720, cells).mean(axis=(1, 3)))

    start = time.perf_counter()
    polar = rows // 36  # rows in five degrees
    ocean[:polar] = True  # in place: written where the mask lies
    ocean[-polar:] = True
    seconds["masking out the poles"] = time.perf_counter() - start
    timed("land without the poles", (~ocean).sum())
    return answers


class PeakMemory(threading.Thread):
    """The most memory this process and its workers held, shared pages counted once (the sum of their PSS)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.nbytes, self.done = 0, threading.Event()
        self.start()

    def run(self):
        while not self.done.wait(0.1):
            pids = ["self", *Path("/proc/self/task", str(threading.main_thread().native_id), "children").read_text().split()]
            for task in Path("/proc/self/task").iterdir():
                pids += (task / "children").read_text().split()
            self.nbytes = max(self.nbytes, sum(pss(pid) for pid in set(pids)))


def pss(pid):
    try:
        lines = Path("/proc", pid, "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has just ended
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
