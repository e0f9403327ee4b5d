"""A simulation, and a second process that watches it while it runs and cannot hold it up.

    python examples/live_monitor.py            # 100 fronts on 2000 cells
    python examples/live_monitor.py --small

How a gene, a species, a flame advances: u' = u_xx + r u (1 - u) (Fisher, 1937), here for many rates r at once, one in each row; central
differences and Euler's steps. The monitor knows nothing but the name under which the simulation publishes its state. Whatever it computes
is of one step (consistent=True); which one, the number n in the state says. Here it asks how far each front has come. What it saw is
compared with the exact front of Ablowitz and Zeppetella (1979), u = (1 + exp(x sqrt(r / 6) - 5 r t / 6))^-2.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import shmarray as sa
from shmarray import shared

PICTURE = Path(__file__).parent / "output" / "live_monitor.png"
ROWS, CELLS, STEPS = (20, 500, 2000) if "--small" in sys.argv else (100, 2000, 14000)
DX, DT, START = 0.1, 0.004, 15.0  # the fronts start there; nothing flows over the ends
rates = np.linspace(0.5, 2, ROWS)[:, None]


def exact(n):
    x = (np.arange(CELLS) + 0.5) * DX - START
    return (1 + np.exp(x * np.sqrt(rates / 6) - 5 * rates * n * DT / 6)) ** -2


if "--watch" in sys.argv:  # the second process
    name, n = sys.argv[-1], -1
    with shared.Store(name) as store, sa.attach(name, consistent=True) as run:
        store["watching"] = True
        front = run.wait("u").sum(axis=1) * DX  # lazy: each compute() sees what is there then
        while n < STEPS:
            before, (n, places) = n, sa.compute(run["n"], front)
            store.list("seen").append((int(n), places))
            if 10 * n // STEPS > 10 * before // STEPS:
                print(f"step {n:6}: the slowest front is at {places[0]:6.2f}, the fastest at {places[-1]:6.2f}", flush=True)
            time.sleep(0.03)
    sys.exit()

r = sa.array(rates)


def step(u, n):
    p = sa.pad(u, ((0, 0), (1, 1)), mode="edge")
    return u + DT * ((p[:, 2:] - 2 * u + p[:, :-2]) / DX**2 + r * u * (1 - u)), n + 1


with shared.Store(f"fronts-{os.getpid()}", create=True) as store:
    monitor = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--watch", store.name])
    store.wait("watching", timeout=60)
    sa.iterate(step, exact(0), np.array(0), steps=STEPS, publish=store)
    assert monitor.wait() == 0
    seen = dict(store["seen"])

assert STEPS in seen
away = max(np.max(abs(places - exact(n).sum(axis=1) * DX)) for n, places in seen.items())
way = 5 * np.sqrt(rates.max() / 6) * STEPS * DT
print(f"the monitor saw {len(seen)} states; the fronts in them are within {away:.2f} of the exact ones, which go up to {way:.1f}")
assert away < 0.01 * way  # Euler's steps are of first order: a rate is wrong by some r DT

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title="What the monitor saw", xlabel="front", ylabel="time")
    times = np.array(list(seen)) * DT
    for row in np.linspace(0, ROWS - 1, 5).astype(int):
        speed = 5 * np.sqrt(rates[row, 0] / 6)
        (dots,) = axes.plot([places[row] for places in seen.values()], times, ".", markersize=3, label=f"rate {rates[row, 0]:.2f}")
        axes.plot(seen[STEPS][row] + speed * (times - times[-1]), times, color=dots.get_color(), linewidth=0.7)
    axes.legend(title="dots: seen; lines: exact speed")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=80)
    print(f"picture: {PICTURE}")
