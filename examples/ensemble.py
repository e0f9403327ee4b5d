"""An ensemble of weather forecasts: mean, spread and quantiles over all runs, for each cell and each day.

    python examples/ensemble.py            # 4000 runs of 40 cells, 60 days
    python examples/ensemble.py --small

Lorenz's model of a circle of latitude, dx[i]/dt = (x[i+1] - x[i-2]) x[i-1] - x[i] + 8 (E. N. Lorenz, "Predictability: a problem partly
solved", 1996), in Runge-Kutta steps of an hour and a half; a unit of time is five days. The runs begin with small errors of their own. Two
checks: mean and quantiles are NumPy's, and while errors are small they double in 2.1 days, on the average over all weathers (E. N. Lorenz
and K. A. Emanuel, "Optimal sites for supplementary weather observations", 1998); in one they take up to a third more or less.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import shmarray as sa

PICTURE = Path(__file__).parent / "output" / "ensemble.png"
RUNS, DAYS = (100, 45) if "--small" in sys.argv else (4000, 60)
CELLS, DT, STEPS_A_DAY = 40, 1 / 80, 16
ERROR = 1e-6  # of each cell at first; the climate varies by 3.6
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def tendency(x):
    return (sa.roll(x, -1, 1) - sa.roll(x, 2, 1)) * sa.roll(x, 1, 1) - x + 8


def step(x):
    k1 = tendency(x)
    k2 = tendency(x + DT / 2 * k1)
    k3 = tendency(x + DT / 2 * k2)
    k4 = tendency(x + DT * k3)
    return x + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


# One run settles on the attractor; all others begin beside it.
truth = sa.iterate(step, 8 + sa.random.default_rng(0).standard_normal((1, CELLS)), steps=50 * STEPS_A_DAY)
x = truth + ERROR * sa.random.default_rng(1).standard_normal((RUNS, CELLS))
runs = sa.empty((DAYS + 1, RUNS, CELLS), chunks=(1, RUNS, CELLS)).persist()
runs[0] = x


def keep(frame):
    runs[frame.step // STEPS_A_DAY] = frame.state[0]


def quantiles_of(day):
    return np.quantile(day, QUANTILES, axis=1).swapaxes(0, 1)


sa.iterate(step, x, steps=DAYS * STEPS_A_DAY, every=STEPS_A_DAY, callback=keep)
quantiles = runs.map_blocks(quantiles_of, chunks=(1, len(QUANTILES), CELLS), dtype=float)  # a task for each day
mean, spread, quantiles = sa.compute(runs.mean(axis=1), runs.std(axis=1), quantiles)
print(runs)

values = np.asarray(runs)  # a view
np.testing.assert_allclose(mean, values.mean(axis=1), rtol=1e-12, atol=1e-12)
np.testing.assert_allclose(spread, values.std(axis=1), rtol=1e-9)
np.testing.assert_allclose(quantiles, quantiles_of(values), rtol=1e-12, atol=1e-12)
print(f"mean, spread and {len(QUANTILES)} quantiles of {(DAYS + 1) * CELLS} cells and days agree with NumPy")

size = np.sqrt((spread**2).mean(axis=1))
small = np.flatnonzero(size < 0.1)[5:]  # after five days, in which errors turn to where they grow
growth = np.polyfit(small, np.log2(size[small]), 1)[0]
print(f"small errors double in {1 / growth:.2f} days (Lorenz and Emanuel, on the average: 2.1); at last the spread is {size[-1]:.2f}")
assert 2.1 / 1.33 < 1 / growth < 2.1 * 1.33

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    fan, errors = figure.subplots(1, 2, width_ratios=(2, 1))
    days = np.arange(DAYS + 1)
    for lower, upper in ((0, 4), (1, 3)):
        fan.fill_between(days, quantiles[:, lower, 0], quantiles[:, upper, 0], color="tab:blue", alpha=0.3, linewidth=0)
    fan.plot(days, quantiles[:, 2, 0], color="tab:blue")
    fan.set(title=f"one cell in {RUNS} runs: median, half and nine tenths of them", xlabel="days")
    errors.semilogy(days, size)
    errors.semilogy(small, size[small[0]] * 2 ** ((small - small[0]) / 2.1), "k--", label="doubling in 2.1 days")
    errors.set(title="spread", xlabel="days")
    errors.legend()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=70)
    print(f"picture: {PICTURE}")
