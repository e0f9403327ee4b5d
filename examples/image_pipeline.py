"""Coins on a drifting table: each frame of a noisy film is denoised, segmented and measured, several frames at once.

The picture comes with scikit-image (pip install scikit-image, which brings SciPy). Afterwards the same is done frame by frame by
functions of SciPy, and every coin of every frame is compared. With matplotlib there is a picture as well.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage import data

import shmarray as sa

PICTURE = Path(__file__).parent / "output" / "image_pipeline.png"
FRAMES, HEIGHT, WIDTH = 40, 270, 340
SMOOTH = 5  # pixels: the noise is a mean over so many squared
STEEPEST = 10  # a change of brightness over two pixels: more is the rim of a coin
SMALLEST = 500  # pixels of a coin
BORDER = SMOOTH // 2 + 1  # pixels that a denoised frame has lost at each side

coins = data.coins().astype(float)


def film():
    """Yield the frames: a window that drifts over the picture, with noise."""
    rng = np.random.default_rng(0)
    for k in range(FRAMES):
        top, left = 2 * k % 30, k
        yield coins[top : top + HEIGHT, left : left + WIDTH] + rng.normal(0, 8, (HEIGHT, WIDTH))


@sa.expression
def rims(frame):
    """Smooth, and say how steep it is: a function of lazy arrays, which the workers compute."""
    rows = sum(frame[k : HEIGHT - SMOOTH + 1 + k] for k in range(SMOOTH))
    smooth = sum(rows[:, k : WIDTH - SMOOTH + 1 + k] for k in range(SMOOTH)) / SMOOTH**2
    return sa.hypot(smooth[2:, 1:-1] - smooth[:-2, 1:-1], smooth[1:-1, 2:] - smooth[1:-1, :-2])


def segmented(steepness):
    """Number the coins: an ordinary function, which runs in a worker."""
    closed = ndimage.binary_closing(steepness > STEEPEST, iterations=2)
    return ndimage.label(ndimage.binary_opening(ndimage.binary_fill_holes(closed), iterations=5))


def measured(segments):
    """Return row, column and area of each coin: a table that the sink is given."""
    labels, count = segments
    numbers = np.arange(1, count + 1)
    area = ndimage.sum_labels(labels > 0, labels, numbers)
    place = np.reshape(ndimage.center_of_mass(labels > 0, labels, numbers), (-1, 2))
    return np.column_stack([place, area])[area >= SMALLEST]


tables = []
report = sa.pipeline(film(), rims, segmented, measured, tables.append)
print(report)
print(f"coins in each frame: {' '.join(str(len(table)) for table in tables)}")

# The same, frame by frame, by other means.
for table, frame in zip(tables, film(), strict=True):
    smooth = ndimage.uniform_filter(frame, SMOOTH)
    down, right = (ndimage.correlate1d(smooth, [-1, 0, 1], axis) for axis in (0, 1))
    labels, count = segmented(np.sqrt(down**2 + right**2)[BORDER:-BORDER, BORDER:-BORDER])
    pixels = [np.argwhere(labels == number) for number in range(1, count + 1)]
    expected = [[*where.mean(axis=0), len(where)] for where in pixels if len(where) >= SMALLEST]
    np.testing.assert_allclose(table, expected)
print(f"the same {sum(map(len, tables))} coins, one frame after the other")

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    shown = [(k, frame) for k, frame in enumerate(film()) if k in (0, FRAMES - 1)]
    for axes, (k, frame) in zip(figure.subplots(1, 2), shown, strict=True):
        axes.imshow(frame, cmap="gray")
        for row, column, area in tables[k]:
            turn = np.linspace(0, 2 * np.pi, 60)
            radius = np.sqrt(area / np.pi)
            axes.plot(column + BORDER + radius * np.cos(turn), row + BORDER + radius * np.sin(turn), color="red")
        axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        axes.set_title(f"frame {k}: {len(tables[k])} coins")
        axes.axis("off")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=100)
    print(f"picture: {PICTURE}")
