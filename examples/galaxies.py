"""How many galaxies does the Hubble Deep Field show? Smoothed, thresholded and counted with shifted slices.

The picture comes with scikit-image, whose own search for peaks (written in Cython, on SciPy) checks the result.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from skimage import data, feature

import shmarray as sa

PICTURE = Path(__file__).parent / "output" / "galaxies.png"
REACH = 5  # two galaxies are at least so many pixels apart
FAINTEST = 60  # of 255

image = data.hubble_deep_field()
rows, columns, _ = image.shape

brightness = sa.asarray(image).astype(float).mean(axis=2)
for _ in range(3):  # three times (1, 2, 1) / 4 along both axes; the edge stays as it is
    smooth = brightness.copy()
    smooth[1:-1] = (brightness[:-2] + 2 * brightness[1:-1] + brightness[2:]) / 4
    brightness = smooth.copy()
    brightness[:, 1:-1] = (smooth[:, :-2] + 2 * smooth[:, 1:-1] + smooth[:, 2:]) / 4

# A peak is as bright as the brightest pixel within reach: a maximum along rows, then along columns.
highest = brightness
for axis in (0, 1):
    padded = sa.concatenate([highest.take([0] * REACH, axis=axis), highest, highest.take([-1] * REACH, axis=axis)], axis=axis)
    length = highest.shape[axis]
    shifted = [padded[i : i + length] if axis == 0 else padded[:, i : i + length] for i in range(2 * REACH + 1)]
    highest = shifted[0]
    for other in shifted[1:]:
        highest = sa.maximum(highest, other)
is_peak = (brightness == highest) & (brightness > FAINTEST)
is_peak[:REACH] = is_peak[-REACH:] = is_peak[:, :REACH] = is_peak[:, -REACH:] = False
print(is_peak)

found = np.argwhere(is_peak)
expected = feature.peak_local_max(np.asarray(brightness), min_distance=REACH, threshold_abs=FAINTEST)
print(f"{len(found)} galaxies and stars brighter than {FAINTEST}; scikit-image finds {len(expected)}")
missed = {tuple(p) for p in expected} - {tuple(p) for p in found}
assert not missed, f"scikit-image also finds {missed}"
print(f"the brightest: {np.asarray(brightness).max():.0f} of 255; the sky between: {np.median(np.asarray(brightness)):.0f}")

figure = Figure(figsize=(8, 7), layout="constrained")
axes = figure.add_subplot(title=f"{len(found)} peaks in the Hubble Deep Field")
axes.imshow(image)
axes.scatter(found[:, 1], found[:, 0], s=40, facecolors="none", edgecolors="yellow", linewidths=0.6)
axes.axis("off")
PICTURE.parent.mkdir(exist_ok=True)
figure.savefig(PICTURE, dpi=100)
print(f"picture: {PICTURE}")
