"""``add.at`` on a stored array and histograms, with a worker killed at each point of a task: each item counts exactly once.

A passage of each point is run always, more with ``make soak``.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from conftest import SOAK_MINUTES, Outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

# Two splits or more into private cells, a fold, an update in place of two tiles.
PROGRAM = """
import hashlib, json
rng = np.random.default_rng(5)
at = rng.integers(-140_000, 140_000, 700_000)
added = rng.random(700_000) * 10.0 ** rng.integers(-6, 6, 700_000)
start = rng.random(140_000)

def program():
    x, counts = sa.array(start, chunks=30_000), sa.zeros(140_000, dtype=int).persist()
    sa.add.at(x, sa.array(at), sa.array(added))
    sa.add.at(counts, at, 1)
    parts = (x, counts, *sa.histogram(sa.array(added), 30, weights=sa.array(added)))
    return hashlib.sha256(b"".join(np.asarray(p).tobytes() for p in parts)).hexdigest(), np.array(counts)

with sa.config.set(scheduler="processes"):
    with sa.Pool(workers=2, memory_limit="256MiB") as pool:
        right, counts = program()
    expected = np.zeros(140_000, int)
    np.add.at(expected, at, 1)
    assert np.array_equal(counts, expected)
    for point, nth in json.loads(os.environ["CASES"]):
        count = os.path.abspath("count-" + point + "-" + str(nth))
        with sa.Pool(workers=2, memory_limit="256MiB") as pool:
            os.environ["SHMARRAY_FAULT"], os.environ["SHMARRAY_FAULT_COUNT"] = "worker." + point + ":" + str(nth) + ":kill", count
            faults.arm(faults.read_environment())
            found, _ = program()
            os.environ.pop("SHMARRAY_FAULT")
            faults.arm(None)
            pool.check()
        acted = os.path.exists(count) and os.path.getsize(count) >= nth
        print(point, nth, found == right, acted, flush=True)
del pool
check_nothing_left()
"""
POINTS = {
    "bind": (2,),
    "bound": (3,),
    "task": (4,),
    "ran": (5,),
    "results": (1,),
    "copy": (2,),
    "half": (4,),
    "copied": (3,),
    "reply": (6,),
}
IN_SOAK = {"bind": (5,), "task": (1, 7, 12), "ran": (2, 8), "results": (4,), "half": (1, 2, 3), "copied": (1,), "reply": (2,)}


def test_a_killed_worker_makes_no_item_count_twice_or_never(script: Callable[..., Outcome]) -> None:
    cases = [(point, nth) for point, passages in POINTS.items() for nth in (*passages, *(IN_SOAK.get(point, ()) if SOAK_MINUTES else ()))]

    out = script(PROGRAM, CASES=json.dumps(cases), limit_s=200)

    rows = [line.split() for line in out.lines]
    assert [(row[0], int(row[1])) for row in rows] == cases
    assert not [row for row in rows if row[2] != "True"]
    assert not [row for row in rows if row[3] != "True"], "points that were never passed"
