"""Two beams of electrons pass through each other, and the smallest ripple grows into vortices: the two-stream instability.

    python examples/plasma.py            # 1 000 000 electrons, 720 steps
    python examples/plasma.py --small    # 40 000 electrons

Particle-in-cell in one dimension (Birdsall and Langdon, "Plasma Physics via Computer Simulation", 1985): each electron lays its charge on
the two cells beside it, Gauss's law gives the field from cell to cell, and electrons feel it with the same shares. Time counts in inverse
plasma frequencies, lengths in what a beam goes in one. Checks: the ripple grows at the rate of cold beams, the root of
1 = 1/2 / (w - k v)^2 + 1/2 / (w + k v)^2; momentum is kept to rounding, energy to a thousandth; charges on the grid are those of NumPy.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import shmarray as sa

PICTURE = Path(__file__).parent / "output" / "plasma.png"
ELECTRONS = 40_000 if "--small" in sys.argv else 1_000_000
CELLS, STEPS, DT = 128, 720, 0.05
K = np.sqrt(3 / 8)  # the wave number that grows fastest
LENGTH = 2 * np.pi / K
DX = LENGTH / CELLS
WEIGHT = CELLS / ELECTRONS  # of an electron: one to a unit of length, in the mean
SHOWN = ELECTRONS // 20_000 + 1 | 1  # every so many electrons are drawn: odd, for both beams

start = (np.arange(ELECTRONS) // 2 * 2 + 1) * LENGTH / ELECTRONS  # evenly, one of each beam at a place
v0 = np.where(np.arange(ELECTRONS) % 2, 1.0, -1.0)
x0 = (start + 1e-3 * v0 * np.sin(K * start)) % LENGTH


def cells(x):
    """Return the cells to the left and to the right of electrons, and their shares."""
    place = x / DX
    left = np.floor(place)
    return left.astype(int) % CELLS, (left.astype(int) + 1) % CELLS, place - left


def field(x):
    left, right, share = cells(x)
    charge = 1 - WEIGHT * (np.bincount(left, 1 - share, minlength=CELLS) + np.bincount(right, share, minlength=CELLS))
    between = np.cumsum(charge) * DX  # behind each cell, but for a constant
    e = (between + np.roll(between, 1)) / 2
    return e - e.mean()


def acceleration(x):
    left, right, share = cells(x)
    e = field(x)
    return -(e[left] * (1 - share) + e[right] * share)


def step(x, v, a):
    v = v + DT / 2 * a
    x = (x + DT * v) % LENGTH
    a = acceleration(x)
    return x, v + DT / 2 * a, a


observe = {  # the energies are those of a length of `LENGTH`
    "momentum": lambda x, v, a: v.mean(),
    "kinetic": lambda x, v, a: (v**2).mean() / 2 * LENGTH,
    "field": lambda x, v, a: (field(x) ** 2).sum() / 2 * DX,
}
frames, pictures = [], {}


def look(frame):
    frames.append((frame.step * DT, *frame.values.values()))
    if frame.step % (STEPS // 6) == 0:
        pictures[frame.step * DT] = np.array(frame.state[0][::SHOWN]), np.array(frame.state[1][::SHOWN])


x, v, a = sa.iterate(step, x0, v0, acceleration(x0), steps=STEPS, every=5, observe=observe, callback=look)
time, momentum, kinetic, electric = np.array(frames).T

s = K**2
rate = np.sqrt((np.sqrt(8 * s + 1) - 2 * s - 1) / 2)
growing = (electric > 1e-4 * LENGTH) & (time < time[electric.argmax()]) & (electric < 1e-2 * LENGTH)
found = np.polyfit(time[growing], np.log(electric[growing]) / 2, 1)[0]
print(f"the field grows as exp({found:.4f} t), that of cold beams as exp({rate:.4f} t)")
assert abs(found / rate - 1) < 0.02

drift = abs((kinetic + electric) / (kinetic[0] + electric[0]) - 1).max()
print(f"energy stays so to {drift:.1e} of it, momentum to {abs(momentum).max():.1e}; {electric.max() / kinetic[0]:.2f} was in the field")
assert drift < 2e-3 and abs(momentum).max() < 1e-12
np.testing.assert_allclose(a, acceleration(np.asarray(x)), rtol=0, atol=1e-12)
print("forces at the end: those of NumPy")

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    growth, *plots = figure.subplots(1, 3)
    growth.semilogy(time, electric, label="field")
    growth.semilogy(time[growing], electric[growing][0] * np.exp(2 * rate * (time[growing] - time[growing][0])), "k--", label="cold beams")
    growth.set(xlabel="time", title="Energy of the field")
    growth.legend()
    for axes, number in zip(plots, (4, 6), strict=True):
        moment = number * (STEPS // 6) * DT
        for beam, colour in ((0, "tab:blue"), (1, "tab:orange")):
            axes.plot(*(values[v0[::SHOWN] == 2 * beam - 1] for values in pictures[moment]), ",", color=colour)
        axes.set(title=f"Velocities at time {moment:.0f}", xlabel="place", xlim=(0, LENGTH), ylim=(-3, 3))
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=80)
    print(f"picture: {PICTURE}")
