"""A vortex street behind a cylinder in a channel, by the lattice-Boltzmann method.

    python examples/lattice_boltzmann.py            # 51 x 288 cells, 12000 steps
    python examples/lattice_boltzmann.py --small    # coarser, a few steps

Nine populations on a square lattice, one relaxation time (Qian, d'Humieres and Lallemand 1992); walls and cylinder bounce them back. The
channel is periodic: in its last part the flow is drawn, more and more, to the parabola it is to enter with, without a change of density.
Two checks: the mass stays what it was, to rounding; and vortices are shed with the Strouhal number of the benchmark 2D-2 of Schaefer and
Turek (1996), whose proportions these are: 0.295 to 0.305 at a Reynolds number of 100.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import shmarray as sa

PICTURE = Path(__file__).parent / "output" / "lattice_boltzmann.png"
IS_SMALL = "--small" in sys.argv
DIAMETER, STEPS, EVERY = (8, 300, 10) if IS_SMALL else (12, 12000, 10)
ROWS, COLUMNS, DRAWN = round(4.1 * DIAMETER) + 2, 24 * DIAMETER, 4 * DIAMETER  # with two rows of wall
SPEED, REYNOLDS = 0.1, 100  # the mean speed, in cells each step
TAU = 0.5 + 3 * SPEED * DIAMETER / REYNOLDS
C = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]  # cells in each step; the opposite of C[k] is C[8 - k]
DOWN, RIGHT = sa.array(np.array(C, float).T[:, :, None, None])
WEIGHTS = sa.array(np.array([1, 4, 1, 4, 16, 4, 1, 4, 1])[:, None, None] / 36)

y, x = np.ogrid[:ROWS, :COLUMNS]
height = (y - 0.5) / (ROWS - 2)
inflow = np.maximum(0, 6 * SPEED * height * (1 - height)) + 0 * x
solid = (y == 0) | (y == ROWS - 1) | ((y - 0.5 - 2 * DIAMETER) ** 2 + (x - 2 * DIAMETER) ** 2 < DIAMETER**2 / 4)
drawing = np.clip((x - (COLUMNS - DRAWN)) / DRAWN, 0, 1) ** 2 + 0 * y
inflow, solid, drawing = sa.array(inflow), sa.array(solid), sa.array(drawing)


def equilibrium(density, down, right):
    along = 3 * (DOWN * down + RIGHT * right)
    return WEIGHTS * density * (1 + along + along * along / 2 - 1.5 * (down * down + right * right))


def moments(f):
    density = sum(f[k] for k in range(9))
    down = sum(c * f[k] for k, (c, _) in enumerate(C) if c) / density
    right = sum(c * f[k] for k, (_, c) in enumerate(C) if c) / density
    return density, down, right


def step(f, density, down, right):
    relaxed = f + (equilibrium(density, down, right) - f) / TAU
    drawn = relaxed + drawing * (equilibrium(density, 0, inflow) - relaxed)
    bounced = sa.where(solid, f[::-1], drawn)
    f = sa.stack([sa.roll(bounced[k], shift, (0, 1)) for k, shift in enumerate(C)])
    return f, *moments(f)


frames = []
start = equilibrium(sa.ones((ROWS, COLUMNS)), 0, sa.where(solid, 0, inflow)).persist()
observe = {"mass": lambda f, *_: f.sum(), "down": lambda f, density, down, right: down[2 * DIAMETER, 4 * DIAMETER]}
f, density, down, right = sa.compute(
    *sa.iterate(step, start, *moments(start), steps=STEPS, every=EVERY, observe=observe, callback=frames.append)
)
mass = start.sum().compute()
drift = max(abs(frame.values["mass"] / mass - 1) for frame in frames)
print(f"{STEPS} steps of {ROWS} x {COLUMNS} cells in {frames[-1].time:.1f} s; the mass is {mass:.6f}, and stays so to {drift:.1e} of it")
assert drift < 1e-10
assert np.abs(right - inflow.compute())[1:-1, -3:].max() < 0.1 * SPEED  # what leaves is what is to enter

behind = np.array([frame.values["down"] for frame in frames])[len(frames) // 2 :]
if not IS_SMALL:
    (rising,) = np.nonzero((behind[:-1] < 0) & (behind[1:] >= 0))
    rises = rising - behind[rising] / (behind[rising + 1] - behind[rising])
    period = np.diff(rises).mean() * EVERY
    strouhal = DIAMETER / SPEED / period
    print(f"a vortex of each sign in {period:.1f} steps: a Strouhal number of {strouhal:.3f} (Schaefer and Turek: 0.295 to 0.305)")
    assert abs(strouhal - 0.3) < 0.02

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2), layout="constrained")
    axes = figure.add_subplot(title="vorticity")
    vorticity = np.gradient(down, axis=1) - np.gradient(right, axis=0)
    vorticity[solid.compute()] = np.nan
    axes.imshow(vorticity, cmap="RdBu", vmin=-0.04, vmax=0.04)
    axes.set_facecolor("black")
    axes.set(xticks=[], yticks=[])
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=80)
    print(f"picture: {PICTURE}")
