"""Heat spreads over a plate: each process computes a band of rows, reads its neighbours' rows in place, and hands snapshots on.

    python examples/shared_simulation.py [--small]

Two grids lie in shared memory. A step reads one and writes the other, and a barrier stands between steps, so no locks are needed: each
row has one writer. Every so often one process hands a copy of the plate to an analyst, which works while the simulation goes on.
The processes are forked, so that the script needs no main guard: spawned ones would import it again.
"""

import itertools
import multiprocessing
import sys

import numpy as np

from shmarray import shared

ROWS, COLUMNS, STEPS, EVERY = (120, 100, 60, 20) if "--small" in sys.argv else (1000, 1000, 300, 100)
PROCESSES = 4
context = multiprocessing.get_context("fork")


def step(before, after, start, stop):
    """Write rows [start, stop) of the next state; the rim of the plate keeps its temperature."""
    rows = slice(max(start, 1), min(stop, len(before) - 1))
    above, below = before[rows.start - 1 : rows.stop - 1], before[rows.start + 1 : rows.stop + 1]
    after[rows, 1:-1] = before[rows, 1:-1] + 0.2 * (
        above[:, 1:-1] + below[:, 1:-1] + before[rows, :-2] + before[rows, 2:] - 4 * before[rows, 1:-1]
    )


def simulate(grids, band, barrier, snapshots):
    for number in range(1, STEPS + 1):
        before, after = grids[(number - 1) % 2], grids[number % 2]
        step(before, after, *band)
        barrier.wait()  # everybody has written; from here on `after` is read
        if number % EVERY == 0 and band[0] == 0:
            snapshots.put((number, shared.copy(after)))  # what travels is a handle
        barrier.wait()  # nobody writes over what is being copied


def analyse(snapshots, results):
    while (item := snapshots.get()) is not None:
        number, plate = item
        results.put((number, float(plate.mean()), float(np.percentile(plate, 99))))


first = np.zeros((ROWS, COLUMNS))
first[0] = 100.0
first[ROWS // 3 : ROWS // 2, COLUMNS // 3 : COLUMNS // 2] = 300.0
grids = shared.copy(first), shared.copy(first)
snapshots, results, barrier = context.Queue(), context.Queue(), context.Barrier(PROCESSES)
edges = np.linspace(0, ROWS, PROCESSES + 1).astype(int).tolist()
workers = [context.Process(target=simulate, args=(grids, band, barrier, snapshots), daemon=True) for band in itertools.pairwise(edges)]
analyst = context.Process(target=analyse, args=(snapshots, results), daemon=True)
for process in [*workers, analyst]:
    process.start()
found = [results.get() for _ in range(STEPS // EVERY)]
for process in workers:
    process.join()
snapshots.put(None)
analyst.join()

for number, mean, hot in found:
    print(f"step {number:4}: mean {mean:8.4f}, the hottest hundredth above {hot:8.4f}")

# The same in one process, on ordinary arrays.
plain = first.copy(), first.copy()
for number in range(1, STEPS + 1):
    step(plain[(number - 1) % 2], plain[number % 2], 0, ROWS)
    if number % EVERY == 0:
        expected = (number, float(plain[number % 2].mean()), float(np.percentile(plain[number % 2], 99)))
        assert expected == found[number // EVERY - 1], expected
assert (plain[STEPS % 2] == grids[STEPS % 2]).all()
print(f"{PROCESSES} processes and one have the same bits")
