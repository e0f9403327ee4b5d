"""Two discs of stars meet: every star attracts every other one, and momentum, angular momentum and energy are conserved.

    python examples/particles.py            # 2 x 1000 stars, 1000 steps
    python examples/particles.py --small    # 2 x 100 stars

Newton's forces between all pairs, softened as Plummer's (1911) and summed directly; the kick-drift-kick form of the leapfrog (Verlet,
1967), which is symplectic: the energy does not drift. Each disc is a heavy core with stars on circles around it, as in Toomre and Toomre,
"Galactic bridges and tails" (1972), though here the stars weigh something, too. Pairs have no memory: four million of them are one pass
over the positions. Forces and what is conserved are computed once more by plain NumPy, for the first and the last state.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import shmarray as sa

PICTURE = Path(__file__).parent / "output" / "particles.png"
STARS, STEPS = (100, 600) if "--small" in sys.argv else (1000, 1000)
DT, SOFTENING, DISC_MASS = 9 / STEPS, 0.1, 0.05

rng = np.random.default_rng(4)


def disc(centre, velocity, tilt):
    """Return masses, positions and velocities, a row for each coordinate: a core of mass 1 and stars that turn around it."""
    r, angle = np.sqrt(rng.uniform(0.3**2, 1, STARS)), rng.uniform(0, 2 * np.pi, STARS)
    speed = np.sqrt(r**2 / (r**2 + SOFTENING**2) ** 1.5)
    plane = np.array([[1, 0], [0, np.cos(tilt)], [0, np.sin(tilt)]])
    place, turn = plane @ (r * [np.cos(angle), np.sin(angle)]), plane @ (speed * [-np.sin(angle), np.cos(angle)])
    masses = np.append(1.0, np.full(STARS, DISC_MASS / STARS))
    return masses, np.c_[np.zeros(3), place] + np.c_[centre], np.c_[np.zeros(3), turn] + np.c_[velocity]


pair = zip(disc([-2.5, -0.6, 0], [0.4, 0, 0], 0.3), disc([2.5, 0.6, 0], [-0.4, 0, 0], -0.8), strict=True)
masses, places, velocities = (np.concatenate(both, axis=-1) for both in pair)
m = sa.array(masses)


def acceleration(x):
    between = [c[None, :] - c[:, None] for c in x]  # from each star to each other one: lazy, never in memory
    near = sum(d * d for d in between) + SOFTENING**2
    pull = m / (near * sa.sqrt(near))
    return sa.stack([(pull * d).sum(axis=1) for d in between])


def step(x, v, a):
    v = v + DT / 2 * a
    x = x + DT * v
    a = acceleration(x)
    return x, v + DT / 2 * a, a


def conserved(x, v):
    """Return momentum, angular momentum and energy, and the accelerations, by NumPy."""
    between = x[:, None, :] - x[:, :, None]
    distance = np.sqrt((between**2).sum(axis=0) + SOFTENING**2)
    potential = -np.outer(masses, masses) / distance
    np.fill_diagonal(potential, 0)
    energy = (masses * (v**2).sum(axis=0)).sum() / 2 + potential.sum() / 2
    return (masses * v).sum(axis=1), (masses * np.cross(x, v, axis=0)).sum(axis=1), energy, (between * masses / distance**3).sum(axis=2)


frames = [(0, places)]


def keep(frame):
    frames.append((frame.step, np.array(frame.state[0])))


x, v, a = sa.iterate(step, places, velocities, acceleration(sa.array(places)), steps=STEPS, every=STEPS // 3, callback=keep)
x, v, a = np.asarray(x), np.asarray(v), np.asarray(a)
before, after = conserved(places, velocities), conserved(x, v)
for name, old, new, bound in zip(("momentum", "angular momentum", "energy"), before, after, (1e-12, 1e-11, 2e-3), strict=False):
    change = np.linalg.norm(new - old) / abs(before[2])
    print(f"{name:18}{np.array2string(old, precision=4, suppress_small=True):30} changed by {change:.1e}")
    assert change < bound
np.testing.assert_allclose(a, after[3], rtol=1e-9, atol=1e-12)
print("forces on all stars: those of NumPy")

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (number, place) in zip(figure.subplots(1, 3, sharey=True), (frames[0], frames[2], frames[3]), strict=True):
        for side, colour in ((slice(STARS + 1), "tab:blue"), (slice(STARS + 1, None), "tab:orange")):
            axes.scatter(place[0, side], place[1, side], s=np.where(masses[side] == 1, 30, 1), color=colour)
        axes.set(title=f"time {number * DT:.1f}", xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=80)
    print(f"picture: {PICTURE}")
