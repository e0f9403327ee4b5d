"""Functions known at points: their slopes there, `gradient`, and their values in between, `interp`.

Promises: NumPy's values to the bit, shapes, dtypes and errors; lazy, within steps of `iterate` too. Slopes are plain slices, which fuse
as any stencil does; what is interpolated costs one pass over the places, which reads all of the points.
Never put here: differences without a spacing (``reductions``), sums.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from shmarray.expr import Block, BlockOperation, exact, make
from shmarray.handle import as_handle, wrap
from shmarray.ops.elementwise import cast
from shmarray.ops.gather import whole_reads
from shmarray.ops.shaping import atleast_1d, concatenate, getitem
from shmarray.region import Box

__all__ = ["gradient", "interp"]

NDArray = np.ndarray[Any, Any]


def gradient(f: Any, *varargs: Any, axis: Any = None, edge_order: int = 1) -> Any:
    """Return the slopes of ``f`` along each axis, central differences inside, one-sided ones at the ends: a tuple, of one axis an array.

    ``varargs``: the distance between neighbours, a number for all axes or one for each; none: 1. Where they are coordinates, arrays, all is
    one call of NumPy. ``axis``: one, or several (None: all). ``edge_order``: 1, or 2 for ends of second order. Floats and complex numbers
    keep their dtype, others become float64. Raises ValueError for fewer than ``edge_order + 1`` elements, TypeError as NumPy does.

    >>> import shmarray as sa
    >>> sa.gradient(sa.array([1.0, 2.0, 4.0, 7.0, 11.0])).compute()
    array([1. , 1.5, 2.5, 3.5, 4. ])
    """
    x = as_handle(f)
    if any(np.ndim(d) for d in varargs) or x.dtype.kind not in "iufc":
        theirs: Any = np.gradient
        found = theirs(np.asarray(x), *(np.asarray(d) for d in varargs), axis=axis, edge_order=edge_order)
        return tuple(map(as_handle, found)) if isinstance(found, tuple) else as_handle(found)
    axes = tuple(range(x.ndim)) if axis is None else np.lib.array_utils.normalize_axis_tuple(axis, x.ndim)
    if len(varargs) not in (0, 1, len(axes)):
        raise TypeError("invalid number of arguments")
    steps = varargs if len(varargs) == len(axes) else (varargs or (1.0,)) * len(axes)
    if edge_order > 2:
        raise ValueError("'edge_order' greater than 2 not supported")
    if any(x.shape[a] < edge_order + 1 for a in axes):
        raise ValueError(
            f"Shape of array too small to calculate a numerical gradient, at least (edge_order + 1) elements are required: {x.shape}"
        )
    y = cast(x, float) if x.dtype.kind in "iu" else x
    slopes = tuple(cast(_slope(y, a, d, edge_order), y.dtype) for a, d in zip(axes, steps, strict=True))
    return slopes[0] if len(axes) == 1 else slopes


def _slope(x: Any, axis: int, d: Any, edge_order: int) -> Any:
    """Return the slope along one axis, every term written as NumPy rounds it."""

    def at(start: int | None, stop: int | None) -> Any:
        return getitem(x, (*(slice(None),) * axis, slice(start, stop)))

    if edge_order == 1:
        first, last = (at(1, 2) - at(0, 1)) / d, (at(-1, None) - at(-2, -1)) / d
    else:
        first = (-1.5 / d) * at(0, 1) + (2.0 / d) * at(1, 2) + (-0.5 / d) * at(2, 3)
        last = (0.5 / d) * at(-3, -2) + (-2.0 / d) * at(-2, -1) + (1.5 / d) * at(-1, None)
    parts = [first, (at(2, None) - at(None, -2)) / (2.0 * d), last]
    return wrap(concatenate([p for p in parts if p.size or not x.size], axis).node, x.chunks)


class _Interp(BlockOperation):
    """What `np.interp` gives for a block of places, and all points."""

    name = "interp"
    memory_inputs = True

    def __init__(self, count: int, left: Any, right: Any, period: Any, sizes: tuple[tuple[int, ...], ...], bits: Any) -> None:
        self.count, self.left, self.right, self.period, self.sizes = count, left, right, period, sizes

    def grid(self) -> tuple[tuple[int, ...], ...]:
        return self.sizes

    def needs(self, at: Box) -> tuple[Box, ...]:
        return at, (slice(0, self.count),), (slice(0, self.count),)

    def run(self, out: NDArray, inputs: tuple[NDArray, ...], at: Box) -> None:
        function: Any = np.interp
        out[...] = function(*inputs, self.left, self.right, self.period)

    def scratch(self, at: Box) -> int:
        items: int = math.prod(s.stop - s.start for s in at)
        return 16 * (3 * items + 6 * self.count)  # complex results, slopes, what a period needs

    def cost(self, at: Box) -> int:
        items: int = math.prod(s.stop - s.start for s in at)
        return 64 * items


_operation = functools.lru_cache(maxsize=256)(_Interp)  # equal ones are one; ``bits`` tell 0.0 from -0.0


def interp(x: Any, xp: Any, fp: Any, left: Any = None, right: Any = None, period: Any = None) -> Any:
    """Return the values at ``x`` of the function that is ``fp`` at the points ``xp``, ascending, and linear between: float64 or complex.

    All may be arrays of any kind, lazy ones too; ``xp`` and ``fp`` are 1-d and of one length. ``left``, ``right``: the values beyond the
    points (None: those of the first and last); ``period``: that of ``xp``, which need not ascend then. Raises ValueError and TypeError as
    NumPy does.

    >>> import shmarray as sa
    >>> sa.interp(sa.array([0.5, 1.25, 9.0]), [0, 1, 2], [0.0, 10.0, 20.0]).compute()
    array([ 5. , 12.5, 20. ])
    """
    places, points, values = as_handle(x), atleast_1d(xp), atleast_1d(fp)
    ends = tuple(v if v is None else np.asarray(v)[()].item() for v in (left, right, period))
    if points.shape != values.shape:
        raise ValueError(f"fp and xp are not of the same length: {values.shape} and {points.shape}")
    probe: Any = np.interp  # which says what it does not take
    dtype = probe(np.zeros(1, places.dtype), *(np.zeros((min(p.size, 1),) * p.ndim, p.dtype) for p in (points, values)), *ends).dtype
    if not places.size:
        return as_handle(np.empty(places.shape, dtype))
    seen = atleast_1d(places)
    operation = _operation(points.size, *ends, whole_reads(seen.shape, [points.node, values.node]), exact(ends))
    found = wrap(make(Block, seen.shape, dtype, operation, (seen.node, points.node, values.node), ("interp", operation)), seen.chunks)
    return found if places.ndim else found[0]
