"""How fast does an elementwise chain reach memory where it is kept: the first time, in cold memory, and later?"""

from __future__ import annotations

import json
import sys

import dask.array as da
import measure
import numexpr
import numpy as np

import shmarray as sa

SHAPE = (20_000, 2_000)
# What gives a NumPy array is compared with what gives one; what stays in chunks with what stays in chunks.
ARRAYS = ("shmarray compute()", "NumPy", "dask compute()", "numexpr")
STORED = ("shmarray persist()", "dask persist()")


def chain(a, b):
    return (a * 2 + b) * (a - b) + a * 0.5


def ready(peer):
    """Return a function that computes and returns the result that is kept. Workers and threads have started."""
    if peer.startswith("shmarray"):
        rng = sa.random.default_rng(0)
        a, b = sa.persist(rng.random(SHAPE), rng.random(SHAPE))
        (a[:2_000] + b[:2_000]).sum().compute(scheduler="processes")
        return (lambda: chain(a, b).compute()) if peer.endswith("compute()") else (lambda: chain(a, b).persist())
    rng = np.random.default_rng(0)
    a, b = rng.random(SHAPE), rng.random(SHAPE)
    if peer == "NumPy":
        return lambda: chain(a, b)
    if peer == "numexpr":
        numexpr.evaluate("a + b", {"a": a[:2_000], "b": b[:2_000]})
        return lambda: numexpr.evaluate("(a*2+b)*(a-b)+a*0.5", {"a": a, "b": b})
    lazy_a, lazy_b = (da.from_array(x, chunks=(1_000, 2_000), name=False) for x in (a, b))
    (lazy_a[:2_000] + lazy_b[:2_000]).sum().compute(scheduler="threads")
    if peer == "dask compute()":
        return lambda: chain(lazy_a, lazy_b).compute(scheduler="threads")
    return lambda: chain(lazy_a, lazy_b).persist(scheduler="threads")


if sys.argv[1:]:  # a fresh process for the first time
    function = ready(sys.argv[1])
    # A virtual machine pays for a page's very first use, whoever that is: let these have been used, by nobody.
    np.ones(250_000_000)
    print(json.dumps(measure.timed(function)[0]))
    sys.exit()

measure.start("(a*2+b)*(a-b)+a*0.5 to a result that is kept, 40 million float64 each (320 MB)")
first = {peer: [] for peer in (*ARRAYS, *STORED)}
for _ in range(5):
    for peer in first:
        first[peer].append(measure.fresh(__file__, peer))
later = measure.in_turn({peer: ready(peer) for peer in (*ARRAYS, *STORED)}, rounds=7, agree=False)
for what, peers in (("to a NumPy array", ARRAYS), ("to an array that stays in chunks", STORED)):
    for when, times in (("the first time, in fresh processes", first), ("later", later)):
        print(f"{what}, {when}:")
        measure.table({peer: times[peer] for peer in peers}, reference=peers[0])
