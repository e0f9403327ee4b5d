"""How far are compiled functions, and NumPy's own, from the true values? Measured in ulp, over random points in several ranges.

True values are those of x86's 80-bit long double, whose 64 bits of mantissa make errors of 1/2000 ulp of float64. Writes the table of
``docs/accuracy.md``, the bounds of which the tests hold (``tests/shmarray/test_llvm_elementwise.py``).

    accuracy.py [--points 100000] [--check]      --check: say what is out of bounds and write nothing
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import shmarray as sa
from shmarray.kernels.llvm.target import machine

TARGET = Path(__file__).parents[1] / "docs" / "accuracy.md"
LONG = np.longdouble
BOUND = 4.0  # what we promise, because libmvec does: other points and other versions of glibc may do worse than what is seen here
BEGIN, END = "<!-- measured by benchmarks/accuracy.py -->\n", "<!-- end -->\n"
Range = tuple[float, float]

# Ranges per operand; where one is wider than the dtype, it is cut to it.
RANGES: dict[str, list[tuple[Range, ...]]] = {
    "exp": [((-1, 1),), ((-80, 80),), ((-745, 709),)],
    "exp2": [((-1, 1),), ((-120, 120),), ((-1074, 1023),)],
    "expm1": [((-1e-3, 1e-3),), ((-1, 1),), ((-40, 80),), ((-700, 709),)],
    "log": [((0.5, 2),), ((1e-5, 1e5),), ((1e-300, 1e300),)],
    "log2": [((0.5, 2),), ((1e-5, 1e5),), ((1e-300, 1e300),)],
    "log10": [((0.5, 2),), ((1e-5, 1e5),), ((1e-300, 1e300),)],
    "log1p": [((-0.5, 1),), ((-1e-3, 1e-3),), ((0, 1e5),), ((1, 1e300),)],
    "sin": [((-3.15, 3.15),), ((-1e3, 1e3),), ((-1e5, 1e5),), ((-1e9, 1e9),)],
    "cos": [((-3.15, 3.15),), ((-1e3, 1e3),), ((-1e5, 1e5),), ((-1e9, 1e9),)],
    "tan": [((-1.6, 1.6),), ((-1e3, 1e3),), ((-1e5, 1e5),), ((-1e9, 1e9),)],
    "arcsin": [((-1, 1),), ((-1e-3, 1e-3),)],
    "arccos": [((-1, 1),), ((0.999, 1),)],
    "arctan": [((-1, 1),), ((-1e3, 1e3),), ((-1e300, 1e300),)],
    "sinh": [((-1, 1),), ((-20, 20),), ((-80, 80),), ((-709, 709),)],
    "cosh": [((-1, 1),), ((-20, 20),), ((-80, 80),), ((-709, 709),)],
    "tanh": [((-1, 1),), ((-20, 20),), ((-1e-3, 1e-3),)],
    "arcsinh": [((-1, 1),), ((-1e3, 1e3),), ((-1e300, 1e300),)],
    "arccosh": [((1, 2),), ((1, 1e3),), ((1, 1e300),)],
    "arctanh": [((-1, 1),), ((-1e-3, 1e-3),)],
    "cbrt": [((-1, 1),), ((-1e5, 1e5),), ((-1e300, 1e300),)],
    "arctan2": [((-1, 1), (-1, 1)), ((-1e3, 1e3), (-1e3, 1e3)), ((-1e300, 1e300), (-1e300, 1e300))],
    "hypot": [((-1, 1), (-1, 1)), ((-1e3, 1e3), (-1e3, 1e3)), ((-1e150, 1e150), (-1e150, 1e150))],
    "power": [((0, 10), (-5, 5)), ((0.5, 2), (-80, 80)), ((1e-30, 1e30), (-3, 3)), ((1e-3, 1e3), (-30, 30))],
    "deg2rad": [((-360, 360),)],
    "rad2deg": [((-7, 7),)],
}


def points(low: float, high: float, count: int, dtype: np.dtype[Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return values between two limits: where these are far apart, half of them of every size, else uniform."""
    limit = float(np.finfo(dtype).max) ** (0.9 if max(abs(low), abs(high)) > 1e38 else 1)
    low, high = max(low, -limit), min(high, limit)
    even = rng.uniform(low / 2, high / 2, count // 2) * 2
    size = max(abs(low), abs(high))
    least = max(low, 0.0) or size * 1e-8 if size < 1e6 else max(low, float(np.finfo(dtype).tiny), 1e-300)
    sizes = np.exp2(rng.uniform(np.log2(least), np.log2(size), count - count // 2))
    signs = np.where(rng.random(sizes.size) < 0.5, -1.0, 1.0) if low < 0 else 1.0
    both = np.concatenate([even, np.clip(sizes * signs, low, high)]).astype(dtype)
    rng.shuffle(both)
    return both


def errors(found: np.ndarray[Any, Any], true: np.ndarray[Any, Any]) -> float:
    """Return the largest error in units of the last place of the true value; overflow of both is none."""
    with np.errstate(all="ignore"):
        near = true.astype(found.dtype)
        both = np.isfinite(near) & np.isfinite(true)
        assert np.array_equal(np.isnan(found), np.isnan(near))
        unit = np.spacing(np.abs(near)).astype(LONG)
        return float(np.max(np.abs(found.astype(LONG) - true)[both] / unit[both], initial=0.0))


def measure(name: str, dtype: np.dtype[Any], count: int) -> tuple[float, float]:
    """Return the largest errors of compiled code and of NumPy."""
    function = getattr(np, name)
    worst = [0.0, 0.0]
    rng = np.random.default_rng(0)
    for ranges in RANGES[name]:
        operands = [points(low, high, count, dtype, rng) for low, high in ranges]
        with np.errstate(all="ignore"):
            true = function(*(x.astype(LONG) for x in operands))
            theirs = function(*operands)
            ours = getattr(sa, name)(*(sa.array(x) for x in operands)).compute()
        worst = [max(worst[0], errors(ours, true)), max(worst[1], errors(theirs, true))]
    return worst[0], worst[1]


def table(count: int) -> tuple[list[str], bool]:
    """Return the lines of the table, and whether all bounds hold."""
    lines = ["| function | dtype | compiled | NumPy | bound |", "|---|---|---:|---:|---:|"]
    holds = True
    for name in RANGES:
        for dtype in map(np.dtype, (np.float32, np.float64)):
            ours, theirs = measure(name, dtype, count)
            holds &= ours <= BOUND
            lines.append(f"| {name} | {dtype.name} | {ours:.2f} | {theirs:.2f} | {BOUND:g} |")
            print(lines[-1] + ("" if ours <= BOUND else " OUT OF BOUNDS"), flush=True)
    return lines, holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache, sa.config.set(engine="llvm", scheduler="synchronous", cache_directory=cache):
        lines, holds = table(options.points)
    if options.check or not holds:
        sys.exit(not holds)
    m = machine()
    where = f"{m.cpu}, vectors of {m.vector_nbytes} bytes; {' '.join(platform.libc_ver())}; NumPy {np.__version__}"
    intro = f"Largest errors, in ulp, of {options.points} random points in each of several ranges ({where}):\n\n"
    before, _, rest = TARGET.read_text().partition(BEGIN)
    TARGET.write_text(before + BEGIN + "\n" + intro + "\n".join(lines) + "\n\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
