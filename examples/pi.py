"""Pi from random points: the share of a square's points that lie in the circle, and a mean over the arc, which is closer.

    python examples/pi.py            # 2^27 points
    python examples/pi.py --small    # 2^20

Buffon's method as Metropolis and Ulam generalised it ("The Monte Carlo method", 1949): a point (x, y) of the unit square lies in the
quarter circle with probability pi / 4, and sqrt(1 - x^2) has the mean pi / 4. Either result has a standard error that follows from the
variance, so that the check is how many of these errors it is away from pi. Points are made where they are counted: they have no memory.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import shmarray as sa

PICTURE = Path(__file__).parent / "output" / "pi.png"
BATCHES, EACH = 1 << 10, 1 << (10 if "--small" in sys.argv else 17)  # so many points
points = BATCHES * EACH

rng = sa.random.default_rng(1)
x, y = rng.random((BATCHES, EACH)), rng.random((BATCHES, EACH))
inside = 4.0 * (x * x + y * y < 1)
arc = 4 * sa.sqrt(1 - x * x)
print(sa.explain(inside.mean(axis=1), arc.mean(axis=1)))

# A mean for each batch, all in one pass: what a batch says, and how it goes on with more points.
by_batch, arc_by_batch = sa.compute(inside.mean(axis=1), arc.mean(axis=1))
errors = {"points in the circle": np.sqrt(np.pi * (4 - np.pi) / points), "mean height of the arc": np.sqrt((32 / 3 - np.pi**2) / points)}
for (name, error), means in zip(errors.items(), (by_batch, arc_by_batch), strict=True):
    away = abs(means.mean() - np.pi) / error
    print(f"{name:24}{means.mean():.6f} +- {error:.6f}: {away:.1f} standard errors from pi")
    assert away < 4, "four standard errors: once in 16,000 seeds"
    # The batches are independent: they vary as they should, which sees streams of random numbers that overlap.
    spread = means.std(ddof=1) / (error * np.sqrt(BATCHES))
    assert abs(spread - 1) < 4 / np.sqrt(2 * BATCHES), spread

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

    n = EACH * np.arange(1, BATCHES + 1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        title=f"Pi from {points:,} points", xlabel="points so far", ylabel="error", xscale="log", yscale="log", ylim=(1e-7, 1e-2)
    )
    for (name, error), means in zip(errors.items(), (by_batch, arc_by_batch), strict=True):
        (line,) = axes.plot(n, abs(np.cumsum(means) / np.arange(1, BATCHES + 1) - np.pi), label=name, linewidth=1)
        axes.plot(n, error * np.sqrt(points / n), color=line.get_color(), linestyle="--", linewidth=1, label="its standard error")
    axes.legend()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=80)
    print(f"picture: {PICTURE}")
