"""What does it cost to update in place exactly once, whoever dies?

Protected and unprotected updates are measured in turn within one run. Unprotected ones are for this benchmark alone: results go straight
over their operands, so that a worker's death in the middle would tear them. NumPy in place and dask, which makes a new array, stand beside.

    in_place.py [--items 40000000] [--rounds 15] [--only all,chain]

To reach: at most 20 % with compiled kernels, 50 % with NumPy's.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import measure
import numpy as np

import shmarray as sa
from shmarray import plan, templates
from shmarray.kernels.program import Program

try:
    import dask.array as da
except ImportError:
    da = None

WORKERS = 2
COLUMNS = 2_000

Update = Callable[[Any, Any], object]
UPDATES: dict[str, tuple[str, Update]] = {
    "add": ("x += y", lambda x, y: x.__iadd__(y)),
    "chain": ("x -= (y*2+c)*y", lambda x, y: x.__isub__((y * 2 + 0.25) * y)),
    "part": ("x[1::2, 3:-5] = x*0.5+y there", lambda x, y: x.__setitem__(HALF, x[HALF] * 0.5 + y[HALF])),
    "strided": ("x[:, ::2] += y[:, ::2]", lambda x, y: x[:, ::2].__iadd__(y[:, ::2])),
    "narrow": ("x[:, 3:10] += y[:, 3:10]", lambda x, y: x[:, 3:10].__iadd__(y[:, 3:10])),
    "flipped": ("x[::-1, ::-1] += y", lambda x, y: x[::-1, ::-1].__iadd__(y)),
    "transposed": ("x.T -= y.T", lambda x, y: x.T.__isub__(y.T)),
    "broadcast": ("x *= y[:1]", lambda x, y: x.__imul__(y[:1])),
}
HALF = (slice(1, None, 2), slice(3, -5))


class Unprotected:
    """A kernel that does not see that it updates in place."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def bind(self, context: Any) -> Callable[[int], None]:
        with mock.patch.object(Program, "updated", ()):
            bound: Callable[[int], None] = self.kernel.bind(context)
            return bound


@contextlib.contextmanager
def unprotected() -> Iterator[None]:
    engine_for = plan.engine_for
    with mock.patch.object(plan, "engine_for", lambda *args: Unprotected(engine_for(*args))), mock.patch.object(Program, "updated", ()):
        yield


def seconds(update: Update, x: Any, y: Any, engine: str, is_protected: bool) -> float:
    """Return how long an update takes whose plan is a template already."""
    templates.forget()
    with sa.config.set(engine=engine), contextlib.nullcontext() if is_protected else unprotected():
        update(x, y)
        return measure.timed(lambda: update(x, y))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=40_000_000, help="float64 per array (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each case (default: %(default)s)")
    parser.add_argument("--only", default=",".join(UPDATES), help="which updates, as add,chain (default: all)")
    parser.add_argument("--engines", default="llvm,numpy", help="which engines (default: %(default)s)")
    options = parser.parse_args()
    measure.start(f"updates in place, {options.items:,} float64 an array, {WORKERS} workers", "llvmlite")
    sa.config.set(workers=WORKERS, scheduler="processes")
    rng = np.random.default_rng(0)
    shape = (max(1, options.items // COLUMNS), COLUMNS)
    a, b = rng.random(shape), rng.random(shape)
    x, y = sa.array(a), sa.array(b)
    lazy = [da.from_array(v, chunks=(1_000, COLUMNS), name=False) for v in (a, b)] if da else None
    for name in options.only.split(","):
        text, update = UPDATES[name]
        cases = {
            f"shmarray {engine} {kind}": (engine, kind == "protected")
            for engine in options.engines.split(",")
            for kind in ("protected", "unprotected")
        }
        times: measure.Times = {case: [] for case in cases}
        times["NumPy"] = []
        for k in range(options.rounds + 1):
            for case, (engine, is_protected) in cases.items():
                times[case].append(seconds(update, x, y, engine, is_protected))
            times["NumPy"].append(measure.timed(lambda update=update: update(a, b))[0])
            if name == "add" and lazy:
                persisted = measure.timed(lambda: (lazy[0] + lazy[1]).persist(scheduler="threads", num_workers=WORKERS))
                times.setdefault("dask x = x + y", []).append(persisted[0])
                del persisted
            if k == 0:  # the round that does not count
                times = {case: [] for case in times}
        print(f"{name}: {text}")
        measure.table(times, reference=f"shmarray {next(iter(cases.values()))[0]} protected")
        for engine in options.engines.split(","):
            with_, without = (times[f"shmarray {engine} {kind}"] for kind in ("protected", "unprotected"))
            ratio = [statistics.median(with_) / statistics.median(without), min(with_) / min(without)]
            print(f"    {engine}: protection costs {ratio[0] - 1:+.0%} by the medians, {ratio[1] - 1:+.0%} by the best", flush=True)


if __name__ == "__main__":
    main()
