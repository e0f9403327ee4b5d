"""A pipeline over a file of measurements: one process reads, some clean and sum up, all at once, and nothing is copied between them.

    python examples/shared_data_processing.py [--small]

Blocks go from process to process as handles. The sums by station lie in one shared array, whose chunks (groups of stations) are
locked one by one while a block is added to them. The processes are forked, so that the script needs no main guard.
"""

import multiprocessing
import sys
import tempfile

import numpy as np

from shmarray import shared

MEASUREMENTS, BLOCK = (50_000, 4_000) if "--small" in sys.argv else (20_000_000, 1_000_000)
STATIONS, GROUP, CLEANERS = 1000, 100, 3
RECORD = np.dtype([("station", "<u2"), ("kelvin", "<f4")])
context = multiprocessing.get_context("fork")


def read(path, blocks):
    with open(path, "rb") as file:
        while True:
            block = shared.empty(BLOCK, RECORD)
            n = file.readinto(memoryview(block).cast("B")) // RECORD.itemsize  # from the file into shared memory
            if n == 0:
                break
            blocks.put(block[:n])
    for _ in range(CLEANERS):
        blocks.put(None)


def clean(blocks, sums, dropped):
    while (block := blocks.get()) is not None:
        kelvin = block["kelvin"]
        is_good = (kelvin > 180) & (kelvin < 340)  # and not NaN
        dropped.add(int(len(block) - is_good.sum()))
        milli = np.rint((kelvin[is_good].astype(float) - 273.15) * 1000).astype("i8")  # integers: sums do not depend on the order
        station = block["station"][is_good]
        count = np.bincount(station, minlength=STATIONS)
        total = np.bincount(station, milli, STATIONS).astype("i8")
        for i in range(STATIONS // GROUP):
            part = slice(i * GROUP, (i + 1) * GROUP)
            with sums.lock((i, 0)) as chunk:  # the others may add to other groups meanwhile
                chunk[:, 0] += count[part]
                chunk[:, 1] += total[part]


rng = np.random.default_rng(1)
records = np.empty(MEASUREMENTS, RECORD)
records["station"] = rng.integers(0, STATIONS, MEASUREMENTS)
records["kelvin"] = 273 + 20 * np.sin(records["station"]) + rng.normal(0, 5, MEASUREMENTS)
records["kelvin"][rng.integers(0, MEASUREMENTS, MEASUREMENTS // 100)] = np.nan
records["kelvin"][rng.integers(0, MEASUREMENTS, MEASUREMENTS // 100)] = -999

with tempfile.NamedTemporaryFile() as file:
    records.tofile(file.name)
    blocks = context.Queue(2 * CLEANERS)  # at most so many blocks of memory wait
    sums, dropped = shared.zeros((STATIONS, 2), "i8", chunks=(GROUP, 2)), shared.Value("q")
    processes = [context.Process(target=read, args=(file.name, blocks))]
    processes += [context.Process(target=clean, args=(blocks, sums, dropped)) for _ in range(CLEANERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

celsius = sums[:, 1] / sums[:, 0] / 1000
print(f"{sums[:, 0].sum():,} measurements of {STATIONS} stations, {dropped.value:,} dropped")
print(f"coldest station {celsius.argmin()}: {celsius.min():.2f} C; warmest {celsius.argmax()}: {celsius.max():.2f} C")

# The same at once, in one process: sorted by station, and averaged in floating point.
good = records[(records["kelvin"] > 180) & (records["kelvin"] < 340)]
good = good[np.argsort(good["station"], kind="stable")]
starts = np.searchsorted(good["station"], np.arange(STATIONS))
expected = np.add.reduceat(good["kelvin"].astype(float), starts) / np.diff(starts, append=len(good)) - 273.15
assert sums[:, 0].sum() == len(good) and dropped.value == MEASUREMENTS - len(good)
np.testing.assert_allclose(celsius, expected, atol=1e-3)
print("every mean agrees with NumPy")
