"""How long does the first computation of a fresh process take, and what do later ones cost at least?"""

from __future__ import annotations

import sys
import time

PEERS = ("shmarray", "NumPy", "dask threads")


def work(peer):
    begin = time.perf_counter()
    if peer == "shmarray":
        import shmarray as sa

        imported = time.perf_counter()
        x = sa.ones((2_000, 2_000)).persist()
        function = lambda: (x + 1).sum().compute()  # noqa: E731
        fixed = lambda: (x[:10] + 1).sum().compute(scheduler="processes")  # noqa: E731  # ten rows, by a worker all the same
    elif peer == "NumPy":
        import numpy as np

        imported = time.perf_counter()
        x = np.ones((2_000, 2_000))
        function = lambda: (x + 1).sum()  # noqa: E731
        fixed = lambda: (x[:10] + 1).sum()  # noqa: E731
    else:
        import dask.array as da

        imported = time.perf_counter()
        x = da.ones((2_000, 2_000), chunks=(500, 2_000)).persist(scheduler="threads")
        function = lambda: (x + 1).sum().compute(scheduler="threads")  # noqa: E731
        fixed = lambda: (x[:10] + 1).sum().compute(scheduler="threads")  # noqa: E731
    function()
    first = time.perf_counter()
    fixed()
    later = []
    for _ in range(50):
        start = time.perf_counter()
        fixed()
        later.append(time.perf_counter() - start)
    return {"import": imported - begin, "first": first - imported, "later": sorted(later)[25]}


if sys.argv[1:]:  # a fresh process, in which nothing is imported yet
    print(str(work(sys.argv[1])).replace("'", '"'))
    sys.exit()

import measure  # noqa: E402  # it imports NumPy, whose import is part of what is measured above

measure.start("start-up: the first result of 32 MB in a fresh process (workers started), and the fixed cost of later ones")
runs = {peer: [] for peer in PEERS}
for _ in range(5):
    for peer in PEERS:
        runs[peer].append(measure.fresh(__file__, peer))
for what, title in (("import", "import:"), ("first", "first result after the import:"), ("later", "later results, of ten rows:")):
    print(title)
    measure.table({peer: [run[what] for run in found] for peer, found in runs.items()})
