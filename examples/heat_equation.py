"""The heat equation on a plate whose rim is kept cold: three modes, each of which decays at a rate of its own.

    python examples/heat_equation.py            # 1000 x 1000 cells, 2000 steps
    python examples/heat_equation.py --small

du/dt = uxx + uyy on the unit square, by forward differences in time and central ones in space (Courant, Friedrichs and Lewy 1928).
sin(m pi y) sin(n pi x) decays as exp(-(m^2 + n^2) pi^2 t); the scheme multiplies it at each step by
1 - 4 r (sin^2(m pi h / 2) + sin^2(n pi h / 2)), r = dt / h^2. The first checks the physics, the second every digit.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import shmarray as sa

PICTURE = Path(__file__).parent / "output" / "heat_equation.png"
N, STEPS, EVERY = (100, 40, 10) if "--small" in sys.argv else (1000, 2000, 100)
MODES = {(3, 5): 1.0, (8, 6): 0.7, (12, 16): 0.5}  # (m, n): the amplitude it begins with
H = 1 / N
R = 0.2  # dt / h^2; up to 1/4 is stable

x = np.linspace(0, 1, N + 1)
shapes = {(m, n): sa.array(np.outer(np.sin(m * np.pi * x), np.sin(n * np.pi * x))) for m, n in MODES}
u = sum(amplitude * shapes[mode] for mode, amplitude in MODES.items())


def step(u):
    new = u.copy()  # the rim stays as it is
    new[1:-1, 1:-1] += R * (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1])
    return new


frames = []
before = u.compute()
u = sa.iterate(
    step,
    u,
    steps=STEPS,
    every=EVERY,
    observe={mode: lambda u, shape=shape: 4 * (u * shape).sum() * H**2 for mode, shape in shapes.items()},
    callback=frames.append,
)
after = u.compute()
print(f"{STEPS} steps of {N} x {N} cells in {frames[-1].time:.1f} s, t = {STEPS * R * H**2:.2g}")

expected = np.zeros_like(after)
for (m, n), amplitude in MODES.items():
    growth = 1 - 4 * R * (np.sin(m * np.pi * H / 2) ** 2 + np.sin(n * np.pi * H / 2) ** 2)
    expected += amplitude * growth**STEPS * shapes[m, n].compute()
    exact = amplitude * np.exp(-(m**2 + n**2) * np.pi**2 * STEPS * R * H**2)
    found = frames[-1].values[m, n]
    print(f"mode ({m}, {n}): {amplitude} became {found:.9f}; exp(...) says {exact:.9f}")
    assert abs(found / exact - 1) < (max(m, n) * np.pi * H) ** 2  # of second order
error = np.abs(after - expected).max()
print(f"the largest difference from the solution of the difference equations is {error:.1e}")
assert error < 1e-12

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    first, last, decay = figure.subplots(1, 3)
    for axes, field, title in ((first, before, "at first"), (last, after, f"after {STEPS} steps")):
        axes.imshow(field, cmap="RdBu_r", vmin=-2, vmax=2)
        axes.set_title(title)
        axes.axis("off")
    times = np.array([frame.step for frame in frames]) * R * H**2
    for (m, n), amplitude in MODES.items():
        (line,) = decay.semilogy(times, amplitude * np.exp(-(m**2 + n**2) * np.pi**2 * times), label=f"mode ({m}, {n})")
        decay.semilogy(times, [frame.values[m, n] for frame in frames], "o", color=line.get_color(), markersize=4)
    decay.set(title="found (dots), and exp(...)", xlabel="time")
    decay.legend()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=70)
    print(f"picture: {PICTURE}")
