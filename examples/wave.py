"""Rain on a pond: the wave equation on a torus, whose energy stays what it was.

    python examples/wave.py            # 1000 x 1000 cells, 600 steps
    python examples/wave.py --small

d2u/dt2 = lap u, leapfrog in time and central differences in space (Courant, Friedrichs and Lewy 1928). Two checks: the energy of the
scheme, |u_new - u_old|^2 / dt^2 + (grad u_new, grad u_old), which it keeps to rounding; and the exact solution of the difference equations
by Fourier transforms of the beginning, without a single step: a wave that the Laplacian multiplies by -m^2 turns by w at each step, with
sin(w / 2) = m dt / 2.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import shmarray as sa

PICTURE = Path(__file__).parent / "output" / "wave.png"
N, STEPS, DROPS = (128, 150, 5) if "--small" in sys.argv else (1000, 600, 12)
DT = 0.6  # the cells have side 1; up to 1 / sqrt(2) is stable

rng = np.random.default_rng(2)
y, x = np.ogrid[:N, :N]
u0 = np.zeros((N, N))
for row, column in rng.uniform(0, N, (DROPS, 2)):
    distance2 = ((y - row + N / 2) % N - N / 2) ** 2 + ((x - column + N / 2) % N - N / 2) ** 2
    u0 += np.exp(-distance2 / 50)


def laplacian(u):
    return np.roll(u, 1, 0) + np.roll(u, -1, 0) + np.roll(u, 1, 1) + np.roll(u, -1, 1) - 4 * u


def step(u, old):
    return 2 * u - old + DT**2 * laplacian(u), u


def energy(u, old):
    return (((u - old) / DT) ** 2 - u * laplacian(old)).sum()


frames = []
u1 = u0 + DT**2 / 2 * laplacian(u0)  # at rest at first
u, _ = sa.iterate(step, u1, u0, steps=STEPS, every=STEPS // 10, observe={"energy": energy}, callback=frames.append)
u = u.compute()

first = energy(u1, u0)
drift = max(abs(frame.values["energy"] / first - 1) for frame in frames)
print(f"{STEPS} steps of {N} x {N} cells in {frames[-1].time:.1f} s; the energy is {first:.6f}, and stays so to {drift:.1e} of it")
assert drift < 1e-11

half = np.sin(np.pi * np.fft.fftfreq(N)) ** 2
w = 2 * np.arcsin(DT * np.sqrt(half[:, None] + half[: N // 2 + 1]))
expected = np.fft.irfft2(np.fft.rfft2(u0) * np.cos(w * (STEPS + 1)), s=(N, N))
error = np.abs(u - expected).max()
print(f"the largest difference from the solution by Fourier transforms is {error:.1e} of {np.abs(u).max():.3f}")
assert error < 1e-9

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot(title=f"{DROPS} drops, {DT * STEPS:.0f} cells later")
    axes.imshow(u, cmap="Blues_r", vmin=-0.1, vmax=0.1)
    axes.axis("off")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=70)
    print(f"picture: {PICTURE}")
