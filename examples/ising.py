"""The Ising model on a square lattice: magnets that melt at Onsager's temperature, several temperatures side by side.

    python examples/ising.py            # 384 x 384 spins, 1200 sweeps
    python examples/ising.py --small

Metropolis's algorithm (Metropolis, Rosenbluth, Rosenbluth, Teller and Teller, 1953) on a checkerboard: spins of one colour have neighbours
of the other colour alone, so that all of them may be flipped at once. Magnetisation and energy, means over the sweeps after the first
fifth, are compared with the exact solution: Onsager (1944) for the energy, Yang (1952) for the magnetisation.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import shmarray as sa

PICTURE = Path(__file__).parent / "output" / "ising.png"
SIDE, SWEEPS = (128, 400) if "--small" in sys.argv else (384, 1200)
EVERY, BLOCKS = 5, 16  # look after so many sweeps; means over so many parts of the run give the errors
CRITICAL = 2 / np.log(1 + np.sqrt(2))
temperatures = np.array([1.6, 1.9, 2.1, 2.2, 2.5, 2.8, 3.2])  # in units of the coupling over Boltzmann's constant

beta = sa.array((1 / temperatures).astype(np.float32))[:, None, None]
is_black = sa.array(np.add.outer(np.arange(SIDE), np.arange(SIDE)) % 2 == 0)
rng = sa.random.default_rng(3)


def neighbours(s):
    return sa.roll(s, 1, 1) + sa.roll(s, -1, 1) + sa.roll(s, 1, 2) + sa.roll(s, -1, 2)


def sweep(s):
    for colour in (is_black, ~is_black):
        loss = 2 * s * neighbours(s)  # of energy, if this spin alone turned
        turns = colour & (rng.random(s.shape, dtype=np.float32) < sa.exp(-beta * loss))
        s = sa.where(turns, -s, s)
    return s


looks = []
observe = {"energy": lambda s: -(s * neighbours(s)).mean(axis=(1, 2)) / 2, "magnetisation": lambda s: s.mean(axis=(1, 2))}
up = sa.ones((len(temperatures), SIDE, SIDE), dtype=np.int8)
spins = sa.iterate(sweep, up, steps=SWEEPS, every=EVERY, observe=observe, callback=lambda frame: looks.append(list(frame.values.values())))


def exact(t):
    """Return energy and magnetisation of a spin in an infinite lattice."""
    k = 2 * np.sinh(2 / t) / np.cosh(2 / t) ** 2
    a, b = 1.0, np.sqrt(1 - k * k)  # the complete elliptic integral is pi / 2 over their arithmetic-geometric mean (Gauss)
    for _ in range(8):
        a, b = (a + b) / 2, np.sqrt(a * b)
    energy = -(1 + (2 * np.tanh(2 / t) ** 2 - 1) / a) / np.tanh(2 / t)
    return energy, (1 - np.sinh(2 / t) ** -4) ** 0.125 if t < CRITICAL else 0.0


series = np.array(looks)[SWEEPS // EVERY // 5 :]  # a row for each look: energy and magnetisation, at each temperature
series = series[len(series) % BLOCKS :].reshape(BLOCKS, -1, 2, len(temperatures)).mean(axis=1)
found, errors = series.mean(axis=0), series.std(axis=0, ddof=1) / np.sqrt(BLOCKS)
print("temperature    energy of a spin             exact      magnetisation                exact")
for t, mean, error in zip(temperatures, found.T, errors.T, strict=True):
    print(f"{t:8.2f}", *(f"{v:14.4f} +- {e:.4f}{x:14.4f}" for v, e, x in zip(mean, error, exact(t), strict=True)))
    assert np.all(abs(mean - exact(t)) < 6 * error + 4 / SIDE)  # the lattice is finite

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

    fine = np.linspace(1.5, 3.3, 500)
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    curve, *grids = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    for label, values, points in zip(("energy", "magnetisation"), zip(*map(exact, fine), strict=True), found, strict=True):
        (line,) = curve.plot(fine, values, label=f"{label}, exact", linewidth=1)
        curve.plot(temperatures, points, "o", color=line.get_color(), label="simulated")
    curve.set(xlabel="temperature")
    curve.legend(fontsize=8)
    for axes, k in zip(grids, (3, 4), strict=True):
        axes.imshow(spins[k], cmap="gray", interpolation="nearest")
        axes.set_title(f"temperature {temperatures[k]}, {'below' if k == 3 else 'above'} the critical {CRITICAL:.3f}", fontsize=9)
        axes.axis("off")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=80)
    print(f"picture: {PICTURE}")
