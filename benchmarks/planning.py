"""What does it cost to plan a million chunks, in time and memory?"""

from __future__ import annotations

import time
import tracemalloc

import dask
import dask.array as da
import measure

import shmarray as sa

measure.start("plan (ones(..., chunks=1) + 1).sum(): one chunk per element")


def expression(module, shape):
    return (module.ones(shape, chunks=1) + 1).sum()


def materialised(x):
    (optimised,) = dask.optimize(x)
    return len(dict(optimised.__dask_graph__()))


def peak_nbytes(function):
    tracemalloc.start()
    kept = function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return peak


MANY, FEWER = (1_000, 1_000), (200, 200)
expression(sa, (4, 4)).compute()

plans, sums = [], []
for _ in range(5):
    seconds, _plan = measure.timed(lambda: expression(sa, MANY).plan())
    plans.append(seconds)
    begin = time.perf_counter()
    assert expression(sa, MANY).compute() == 2_000_000
    sums.append(time.perf_counter() - begin)
print("shmarray, a million chunks:")
measure.table({"plan": plans, "plan and compute": sums}, reference="plan")
print(f"  memory of the plan at its peak: {peak_nbytes(lambda: expression(sa, MANY).plan()) / 1e6:.1f} MB")

count = FEWER[0] * FEWER[1]
build, _x = measure.timed(lambda: expression(da, FEWER))
graph, _n = measure.timed(lambda: materialised(_x))
run, _total = measure.timed(lambda: _x.compute(scheduler="threads"))
print(f"dask, {count:,} chunks (a million would take minutes):")
print(f"  build {measure.clock(build)}, optimise and materialise {measure.clock(graph)}, compute {measure.clock(run)}")
print(f"  per million chunks: {(build + graph) / count * 1e6:.0f} s to plan, {run / count * 1e6:.0f} s to compute")
print(f"  memory of the graph at its peak, at {FEWER[0] * FEWER[1] // 4:,} chunks: ", end="")
print(f"{peak_nbytes(lambda: materialised(expression(da, (100, 100)))) / 1e6:.0f} MB")
