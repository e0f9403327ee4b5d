"""Arrays with a border: ``pad``. The border is read through views, so that a stencil over a padded array needs no padded array.

Promises: NumPy's values, shapes and dtypes for every mode that only repeats elements or writes constants; no bytes move until the
result is computed, and none at all where it is read by an elementwise chain (`hoist`).
Never put here: kernels; borders that are computed (means, ramps).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np

from shmarray.expr import Assemble, make
from shmarray.handle import as_handle, value_of, wrap
from shmarray.ops.creation import full
from shmarray.ops.shaping import view_of
from shmarray.region import IndexMap

__all__ = ["pad"]

MODES = ("constant", "edge", "reflect", "symmetric", "wrap", "empty")
# Along one axis: (where in the result, how many items, first index in the source, step; None: a constant, the second before the array)
Segment = tuple[int, int, int, int | None]


def pad(array: Any, pad_width: Any, mode: str = "constant", *, constant_values: Any = 0) -> Any:
    """Return ``array`` with a border of ``pad_width`` items, of the same dtype.

    ``pad_width``: an int for all sides, (before, after) for all axes, a sequence of such pairs, or a dict of axis to either.
    ``mode``: "constant" (``constant_values``, in the same forms), "edge" (the last item again), "reflect" and "symmetric" (mirrored,
    without and with the last item), "wrap" (periodic), "empty" (anything; here zeros). Chunks at the ends of an axis take in the border.

    Raises ValueError for another mode, a negative width, and a border of no constants around an axis without elements.

    >>> import shmarray as sa
    >>> u = sa.array([1.0, 4.0, 9.0])
    >>> p = sa.pad(u, 1, mode="wrap")
    >>> (p[2:] - 2 * p[1:-1] + p[:-2]).compute()  # reads u alone: no padded array is made
    array([ 11.,   2., -13.])
    """
    x = as_handle(array)
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(
            f"pad(mode={mode!r}): the modes are {', '.join(map(repr, MODES))}; for others pad in NumPy, np.pad(np.asarray(x), ...)"
        )
    widths = _pairs(pad_width, x.ndim, "pad_width", operator.index)
    if any(n < 0 for pair in widths for n in pair):
        raise ValueError(f"pad(pad_width={pad_width!r}): a border cannot be narrower than nothing; to take items away use slices")
    is_constant = mode in ("constant", "empty")
    values = _pairs(constant_values if mode == "constant" else 0, x.ndim, "constant_values", lambda v: v)
    for axis, (n, pair) in enumerate(zip(x.shape, widths, strict=True)):
        if not n and any(pair) and not is_constant:
            raise ValueError(f"pad(mode={mode!r}): axis {axis} has no elements to repeat; mode='constant' can extend it")
    if not any(n for pair in widths for n in pair):
        return value_of(x)
    shape = tuple(n + b + a for n, (b, a) in zip(x.shape, widths, strict=True))
    axes = [list(_segments(n, *pair, "constant" if is_constant else mode)) for n, pair in zip(x.shape, widths, strict=True)]
    pieces, maps = [], []
    for segments in itertools.product(*axes):
        sizes = tuple(n for _, n, _, _ in segments)
        borders = [k for k, (_, _, _, step) in enumerate(segments) if step is None]
        if borders:  # of several axes the last one writes a corner
            axis = borders[-1]
            pieces.append(full(sizes, values[axis][segments[axis][2]], x.dtype).node)
        else:
            offsets = tuple(first for _, _, first, _ in segments)
            moving = tuple((k, step) if step else (-1, 0) for k, (_, _, _, step) in enumerate(segments))
            pieces.append(view_of(x, IndexMap(sizes, offsets, moving)).node)
        maps.append(IndexMap(sizes, tuple(at for at, _, _, _ in segments), tuple((k, 1) for k in range(x.ndim))))
    chunks = tuple((c[0] + b, *c[1:-1], c[-1] + a) if len(c) > 1 else (c[0] + b + a,) for c, (b, a) in zip(x.chunks, widths, strict=True))
    return wrap(make(Assemble, shape, x.dtype, tuple(pieces), tuple(maps), "pad", True), chunks)


def _segments(n: int, before: int, after: int, mode: str) -> Iterator[Segment]:
    """Yield what the result is made of along an axis of ``n`` items, without gaps."""
    if mode in ("constant", "edge"):
        still = None if mode == "constant" else 0
        if before:
            yield 0, before, 0, still
        if n:
            yield before, n, 0, 1
        if after:
            yield before + n, after, (n - 1 if mode == "edge" else 1), still
        return
    place = -before
    while place < n + after:
        if n == 1:
            run, first, step = (n + after) - place, 0, 0
        elif mode == "wrap":
            first, step = place % n, 1
            run = n - first
        else:
            period = 2 * n if mode == "symmetric" else 2 * (n - 1)
            at = place % period
            last = n if mode == "symmetric" else n - 1  # where the way back begins
            run, first, step = (last - at, at, 1) if at < last else (period - at, 2 * last - at - (mode == "symmetric"), -1)
            if mode == "reflect" and place == 0:
                run = n  # the array itself in one piece: its last item ends the way forth and begins the way back
        run = min(run, n + after - place)
        yield place + before, run, first, (step if run > 1 else step and 1)
        place += run


def _pairs(given: Any, ndim: int, name: str, convert: Any) -> list[tuple[Any, Any]]:
    """Return (before, after) for each axis, from any of the forms NumPy takes."""
    if isinstance(given, dict):
        result = [(convert(0), convert(0))] * ndim
        for axis, value in given.items():
            (only,) = np.lib.array_utils.normalize_axis_tuple(axis, ndim)
            result[only] = _pairs(value, 1, name, convert)[0]
        return result
    table = np.asarray(given, dtype=object)
    try:
        pairs = np.broadcast_to(table, (ndim, 2))
    except ValueError:
        raise ValueError(
            f"pad({name}={given!r}): give one value, a (before, after) pair, or {ndim} such pairs, one for each axis"
        ) from None
    try:
        return [(convert(b), convert(a)) for b, a in pairs]
    except TypeError:
        raise TypeError(f"pad({name}={given!r}): widths are integers") from None
