"""How many galaxies does the Hubble Deep Field show? Smoothed and counted with shifted slices.

The picture comes with scikit-image, whose own search for peaks (written in Cython, on SciPy) checks the result.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from skimage import data, feature

import shmarray as sa

PICTURE = Path(__file__).parent / "output" / "galaxies.png"
REACH = 5  # two galaxies are at least so many pixels apart
FAINTEST = 60  # of 255

image = data.hubble_deep_field()
brightness = sa.asarray(image).astype(float).mean(axis=2)

# Smooth three times with (1, 2, 1) / 4 along both axes, in place; the outermost pixels stay as they are.
for _ in range(3):
    before = brightness.persist()
    brightness = before.copy()
    brightness[1:-1] = (before[:-2] + 2 * before[1:-1] + before[2:]) / 4
    before = brightness.copy()
    brightness[:, 1:-1] = (before[:, :-2] + 2 * before[:, 1:-1] + before[:, 2:]) / 4

# A peak is as bright as the brightest pixel within reach: a maximum along rows, then along columns. Nothing is computed yet.
brightest = brightness
for axis in (0, 1):
    brightest = reduce(sa.maximum, [sa.roll(brightest, k, axis=axis) for k in range(-REACH, REACH + 1)])
is_peak = (brightness == brightest) & (brightness > FAINTEST)
is_peak[:REACH] = is_peak[-REACH:] = is_peak[:, :REACH] = is_peak[:, -REACH:] = False  # the edge, where roll wraps round
print(is_peak)

light = brightness.compute()  # a view of shared memory: nothing is copied
found = np.argwhere(is_peak.compute())
expected = feature.peak_local_max(light, min_distance=REACH, threshold_abs=FAINTEST)
assert sorted(map(tuple, found)) == sorted(map(tuple, expected))
print(f"{len(found)} galaxies and stars brighter than {FAINTEST} of 255; scikit-image finds the same {len(expected)}")
print(f"the brightest has {light.max():.0f}, the dark sky between them {np.median(light):.0f}")

figure = Figure(figsize=(8, 7), layout="constrained")
axes = figure.add_subplot(title=f"{len(found)} peaks in the Hubble Deep Field")
axes.imshow(image)
axes.scatter(found[:, 1], found[:, 0], s=40, facecolors="none", edgecolors="yellow", linewidths=0.6)
axes.axis("off")
PICTURE.parent.mkdir(exist_ok=True)
figure.savefig(PICTURE, dpi=100)
print(f"picture: {PICTURE}")
