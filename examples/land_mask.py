"""The land of the Earth at one kilometre: 933 million cells in shared memory, worked through by all cores.

    python examples/land_mask.py            # all of it: 21600 x 43200 cells
    python examples/land_mask.py --small    # every 20th row and column

The mask is data of the package `global-land-mask` (True where there is ocean). `explore` is NumPy code as anybody would write it.
It is called here with an shmarray array, and in a second process with a NumPy array; the answers must agree.
"""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import shmarray as sa

STEP = 20 if "--small" in sys.argv else 1  # take every STEP-th row and column
PACKAGE = find_spec("global_land_mask") or sys.exit("the mask is missing: pip install global-land-mask matplotlib")
DATA = Path(PACKAGE.origin).with_name("globe_combined_mask_compressed.npz")
PICTURE = Path(__file__).parent / "output" / "land_mask.png"
EARTH_RADIUS_KM = 6371.0088
seconds = {}  # what -> how long it took


@contextmanager
def clock(what):
    start = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - start


def load():
    """Return the mask as a stored array, decompressed chunk by chunk: there is never a second copy of it."""
    with zipfile.ZipFile(DATA) as archive, archive.open("mask.npy") as file:
        np.lib.format.read_magic(file)
        (rows, columns), _, dtype = np.lib.format.read_array_header_1_0(file)
        ocean = sa.empty((rows // STEP, columns // STEP), dtype, chunks=(240 // STEP, -1)).persist()
        for i in range(ocean.numblocks[0]):
            piece = np.frombuffer(file.read(240 * columns), dtype).reshape(240, columns)
            with ocean.lock((i, 0), "w") as chunk:  # the memory itself; nobody else gets at this chunk meanwhile
                chunk[...] = piece[::STEP, ::STEP]
    return ocean


def explore(ocean):
    """Return the answers as NumPy values. ``ocean``: an shmarray array (np.asarray computes what is lazy), or a NumPy array."""
    rows, columns = ocean.shape
    edges = np.sin(np.radians(np.linspace(90, -90, rows + 1)))
    cell_km2 = EARTH_RADIUS_KM**2 * (edges[:-1] - edges[1:]) * 2 * np.pi / columns  # of one cell in each row

    with clock("land area by latitude"):
        land_km2 = np.asarray((~ocean).sum(axis=1)) * cell_km2
        by_latitude = land_km2.reshape(18, -1).sum(axis=1) / (cell_km2 * columns).reshape(18, -1).sum(axis=1)

    with clock("coastline cells"):  # land with ocean to the north, south, west or east
        north, south, west, east = ocean[:-2, 1:-1], ocean[2:, 1:-1], ocean[1:-1, :-2], ocean[1:-1, 2:]
        coast = int((~ocean[1:-1, 1:-1] & (north | south | west | east)).sum())

    with clock("half-degree squares"):
        side = rows // 360
        squares = 1 - np.asarray(ocean.reshape(360, side, 720, side).mean(axis=(1, 3)))

    with clock("mask out the poles, in place"):
        polar = rows // 36  # five degrees
        ocean[:polar] = True
        ocean[-polar:] = True
        land_left = int((~ocean).sum())

    return {"land_km2": land_km2.sum(), "by_latitude": by_latitude, "coast": coast, "squares": squares, "land_left": land_left}


class PeakMemory(threading.Thread):
    """Watches the most memory that this process and its workers hold together; shared pages count once (PSS)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.nbytes = 0
        self.start()

    def run(self):
        while True:
            pids = ["self"]
            for children in Path("/proc/self/task").glob("*/children"):
                pids += children.read_text().split()
            self.nbytes = max(self.nbytes, sum(map(pss_nbytes, pids)))
            time.sleep(0.1)


def pss_nbytes(pid):
    try:
        lines = Path("/proc", pid, "smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


if "--numpy" in sys.argv:  # the second process: the same with NumPy
    with clock("load"):
        ocean = np.load(DATA)["mask"][::STEP, ::STEP]
    answers = explore(ocean)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.buffer.write(pickle.dumps((answers, seconds, highest)))
    sys.exit()

memory = PeakMemory()
print("loading the mask ...", flush=True)
with clock("load"):
    ocean = load()
print(ocean)
answers = explore(ocean)
peak = memory.nbytes
print("the same once more with NumPy ...", flush=True)
second_process = subprocess.run([sys.executable, __file__, "--numpy", *sys.argv[1:]], stdout=subprocess.PIPE, check=True)
expected, numpy_seconds, numpy_peak = pickle.loads(second_process.stdout)

assert answers["coast"] == expected["coast"] and answers["land_left"] == expected["land_left"]
for name in ("land_km2", "by_latitude", "squares"):
    np.testing.assert_allclose(answers[name], expected[name], rtol=1e-12, atol=1e-15)
if STEP == 1:
    assert abs(answers["land_km2"] - 148.9e6) < 0.02 * 148.9e6, "the accepted figure for the Earth is 148.9 million km2"

print(f"\nland             {answers['land_km2'] / 1e6:.1f} million km2 (accepted: 148.9)")
print(f"coastline cells  {answers['coast']:,}")
print(f"land cells between 85 N and 85 S  {answers['land_left']:,}")
print("land by latitude, 90 N to 90 S, in %:", *(f"{100 * x:.0f}" for x in answers["by_latitude"]))
print("every number agrees with NumPy\n")
print(f"{'':30}{'NumPy':>10}{'shmarray':>10}")
for what, mine in seconds.items():
    print(f"{what:30}{numpy_seconds[what]:8.2f} s{mine:8.2f} s")
print(f"{'peak memory':30}{numpy_peak / 2**20:6.0f} MiB{peak / 2**20:6.0f} MiB")

from matplotlib.figure import Figure  # noqa: E402  # only now: its memory is not part of the comparison

figure = Figure(figsize=(11, 5), layout="constrained")
world, bars = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
world.imshow(answers["squares"], extent=(-180, 180, -90, 90), cmap="YlGn", vmin=0, vmax=1, aspect="auto")
world.set(title="Share of land in squares of half a degree", xlabel="longitude", ylabel="latitude", yticks=range(-90, 91, 30))
bars.barh(np.arange(85, -90, -10), 100 * answers["by_latitude"], height=9, color="tab:green")
bars.set(title="Land by latitude", xlabel="% of the area", xlim=(0, 100))
PICTURE.parent.mkdir(exist_ok=True)
figure.savefig(PICTURE, dpi=110)
print(f"\nmap: {PICTURE}")
