"""Six patterns of the Gray-Scott model at once, named as in Pearson's chart, among them the two states that have none.

    python examples/gray_scott.py            # 6 x 160 x 160 cells, 10000 steps
    python examples/gray_scott.py --small

du/dt = 2e-5 lap u - u v^2 + F (1 - u), dv/dt = 1e-5 lap v + u v^2 - (F + k) v, on a periodic square, with the mesh, the time step and the
square patches of J. E. Pearson, "Complex patterns in a simple system" (Science, 1993); (F, k) are examples of his classes. Three checks:
R and B end in the uniform states whose values are roots of a polynomial; what is fed in and taken out is what the sum of u and v gains and
loses, at every step; and the first steps are done once more with NumPy.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import shmarray as sa

PICTURE = Path(__file__).parent / "output" / "gray_scott.png"
N, STEPS, SEEDS = (48, 2000, 1) if "--small" in sys.argv else (160, 10000, 10)
CLASSES = {"R": (0.040, 0.070), "B": (0.080, 0.040), "γ": (0.022, 0.051), "θ": (0.046, 0.061), "κ": (0.062, 0.063), "μ": (0.046, 0.065)}
F, K = np.array(list(CLASSES.values())).T[:, :, None, None]
H = 2.5 / 256
TRACE = 1e-20  # of v, given in each step: where there is none it would sink to subnormal numbers, with which processors are slow

rng = np.random.default_rng(1)
u0, v0 = np.ones((6, N, N)), np.zeros((6, N, N))
for row, column in rng.integers(0, N - 20, (SEEDS, 2)):
    u0[:, row : row + 20, column : column + 20] = 0.5
    v0[:, row : row + 20, column : column + 20] = 0.25
u0 *= 1 + rng.uniform(-0.01, 0.01, u0.shape)


def laplacian(w):
    return (np.roll(w, 1, 1) + np.roll(w, -1, 1) + np.roll(w, 1, 2) + np.roll(w, -1, 2) - 4 * w) / H**2


def step(u, v):
    """For arrays of shmarray and of NumPy; the time step is 1."""
    uvv = u * v * v
    return u + 2e-5 * laplacian(u) - uvv + F * (1 - u), v + 1e-5 * laplacian(v) + uvv - (F + K) * v + TRACE


def imbalance(u, v, u_before, v_before):
    gain = (u + v - u_before - v_before).mean(axis=(1, 2))
    return sa.abs(gain - F[:, 0, 0] * (1 - u_before.mean(axis=(1, 2))) + (F + K)[:, 0, 0] * v_before.mean(axis=(1, 2))).max()


frames = []
u, v = sa.iterate(step, u0, v0, steps=STEPS, every=STEPS // 20, observe={"imbalance": imbalance}, callback=frames.append)
u, v = sa.compute(u, v)
worst = max(frame.values["imbalance"] for frame in frames)
print(f"{STEPS} steps of 6 x {N} x {N} cells in {frames[-1].time:.1f} s; the balance of u + v holds to {worst:.1e}")
assert worst < 1e-15

(feed, kill), blue = CLASSES["B"], 1
u_blue = (1 - np.sqrt(1 - 4 * (feed + kill) ** 2 / feed)) / 2
for name, at, u_expected, v_expected in (("R", 0, 1.0, 0.0), ("B", 1, u_blue, (1 - u_blue) * feed / (feed + kill))):
    print(f"{name}: u = {u[at].mean():.9f}, v = {v[at].mean():.9f}; the roots are {u_expected:.9f}, {v_expected:.9f}")
    np.testing.assert_allclose(u[at], u_expected, atol=1e-6)
    np.testing.assert_allclose(v[at], v_expected, atol=1e-6)
for at, name in enumerate(CLASSES):
    print(f"{name}: v from {v[at].min():.3f} to {v[at].max():.3f}, above 0.1 in {100 * (v[at] > 0.1).mean():.0f} % of the square")

few = sa.compute(*sa.iterate(step, u0, v0, steps=100))
for _ in range(100):
    u0, v0 = step(u0, v0)
np.testing.assert_allclose(few, (u0, v0), rtol=1e-12, atol=1e-15)
print("the first 100 steps agree with NumPy")

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    for axes, field, (name, (feed, kill)) in zip(figure.subplots(2, 3).flat, u, CLASSES.items(), strict=True):
        axes.imshow(field, cmap="turbo_r", vmin=0.2, vmax=1)
        axes.set_title(f"{name}: F = {feed}, k = {kill}")
        axes.axis("off")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=80)
    print(f"picture: {PICTURE}")
