"""Items added to cells: histograms, `bincount`, ``ufunc.at``, and the bins they are made of, under NumPy's names and signatures.

Promises: counts are NumPy's, bin by bin, for values on edges too; integers are exact; floats are added in an order that follows from
shapes alone, the same bits for any chunks, workers and executors. Lazy, edges included, but for what decides a shape: the largest
number that `bincount` counts, and bins that are to be chosen ("auto"), are computed at the call. What NumPy alone knows (long
doubles, times, booleans as weights) is one call of NumPy on the whole. In a step of `iterate`, where nothing has values yet, all of it
is an expression or refused.
Never put here: how cells are found and added to (`kernels.accumulate`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from shmarray.compute import compute
from shmarray.expr import Accumulate, Block, BlockOperation, make
from shmarray.handle import Handle, as_handle, wrap
from shmarray.ops.creation import arange
from shmarray.ops.elementwise import apply, cast
from shmarray.ops.gather import is_traced
from shmarray.ops.reductions import max as largest
from shmarray.ops.reductions import min as smallest
from shmarray.ops.shaping import broadcast_to
from shmarray.region import Box, broadcast_shape

__all__ = ["at", "at_traced", "bincount", "digitize", "histogram", "histogram2d", "histogram_bin_edges", "histogramdd"]

NDArray = np.ndarray[Any, Any]
MANY_INDICES = 1 << 18  # from so many on, `at` is worth several tasks and a pass over the array; fewer are added by this process, at once
# Ufuncs whose result does not depend on the order of indices, but for the rounding of floats.
ACCUMULATED = ("add", "subtract", "multiply", "minimum", "maximum", "bitwise_and", "bitwise_or", "bitwise_xor")
ITEMS_PER_CELL = 4  # and so many of them for each element of the array


class _Edges(BlockOperation):
    """Edges of ``count`` even bins from the smallest to the largest value, as NumPy computes them."""

    name = "bin edges"
    memory_inputs = True

    def __init__(self, count: int, *, is_strict: bool) -> None:
        self.count, self.is_strict = count, is_strict

    def grid(self) -> tuple[tuple[int, ...], ...]:
        return ((self.count + 1,),)

    def needs(self, at: Box) -> tuple[Box, ...]:
        return ((slice(0, 1),), (slice(0, 1),))

    def run(self, out: NDArray, inputs: tuple[NDArray, ...], at: Box) -> None:
        (first,), (last,) = inputs
        if not (np.isfinite(first) and np.isfinite(last)):
            raise ValueError(f"autodetected range of [{first}, {last}] is not finite: give range=(low, high)")
        if first == last:
            first, last = first - 0.5, last + 0.5
        edges = np.linspace(first, last, self.count + 1, dtype=out.dtype)
        if self.is_strict and np.any(edges[:-1] >= edges[1:]):
            raise ValueError(f"Too many bins for data range. Cannot create {self.count} finite-sized bins.")
        out[...] = edges

    def cost(self, at: Box) -> int:
        return 64 * self.count


def _edges_of(x: Any, count: int, *, is_strict: bool) -> Any:
    """Return the edges of ``count`` bins over the range of ``x``, which has elements. The range is found by the plan that reads them."""
    probe = x.dtype.type(0), x.dtype.type(1)
    dtype = np.linspace(*probe, 2).dtype if x.dtype.kind == "f" else np.dtype(float)
    args = (smallest(x)[None].node, largest(x)[None].node)
    operation = _Edges(count, is_strict=is_strict)
    return wrap(make(Block, (count + 1,), dtype, operation, args, ("bin edges", operation)))


def _cells(
    label: str,
    shape: tuple[int, ...],
    dtype: Any,
    data: Sequence[Any],
    tables: Sequence[Any] = (),
    values: Any = None,
    ufunc: str = "add",
    is_at: bool = False,
) -> Any:
    """Return the cells that items of one shape are added to."""
    items = [x if x.ndim else x[None] for x in (*data, *(() if values is None else (values,)))]
    if not math.prod(shape) or not items[0].size:
        return as_handle(np.zeros(shape, dtype))
    nodes = tuple(x.node for x in items)
    return wrap(make(Accumulate, shape, np.dtype(dtype), label, ufunc, nodes, tuple(t.node for t in tables), values is not None, is_at))


def _plain(value: Any) -> Any:
    """Return a parameter with the arrays in it computed: edges, ranges."""
    if isinstance(value, Handle):
        values = np.asarray(value)
        return values if values.ndim else values[()]
    return type(value)([_plain(v) for v in value]) if type(value) in (list, tuple) else value


def _length(bins: Any) -> int | None:
    """Return how many entries ``bins`` has; None for a number."""
    try:
        return len(bins)
    except TypeError:
        return None


def _by_numpy(function: Any, *args: Any) -> Any:
    """One call of NumPy on the whole."""
    results = function(*(np.asarray(a) if isinstance(a, Handle) else a for a in args))
    return tuple(as_handle(r) for r in results) if isinstance(results, tuple) else as_handle(results)


def _is_known(dtype: np.dtype[Any], kinds: str) -> bool:
    return dtype.kind in kinds and dtype.itemsize <= (16 if dtype.kind == "c" else 8)


def _subtractable(a: Any) -> Any:
    """Return the data of a histogram: booleans as bytes, with NumPy's warning."""
    x = as_handle(a)
    if x.dtype != bool:
        return x
    warnings.warn(f"Converting input from {x.dtype} to {np.uint8} for compatibility.", RuntimeWarning, stacklevel=3)
    return cast(x, np.uint8)


def _like_weights(weights: Any) -> tuple[Any, Any]:
    """Return what weights are added in, and what the result is cast to, as in NumPy the dtype of the weights."""
    kind = weights.dtype.kind
    return {"i": np.int64, "u": np.uint64, "f": np.float64, "c": np.complex128}[kind], weights.dtype


def histogram(a: Any, bins: Any = 10, range: Any = None, density: Any = None, weights: Any = None) -> Any:
    """Return how many elements of ``a`` lie in each bin, and the edges of the bins: arrays of shapes (n,) and (n + 1,).

    ``bins``: how many even ones, over ``range`` (None: from the smallest element to the largest, found in a pass of the same plan);
    their edges, ascending; or the name of a rule of NumPy's, which chooses edges at the call, from values computed there. A bin holds
    ``edge <= x < next edge``, the last one its right edge, too; elements outside, and NaN, are in none. ``weights``, of the shape of
    ``a``: what to add instead of 1. ``density``: divide by widths and total. Counts are int64; with weights of their dtype.

    Raises ValueError, TypeError as NumPy does; for elements that give no finite range when it is computed.

    >>> import shmarray as sa
    >>> counts, edges = sa.histogram(sa.arange(10) ** 2, bins=3)
    >>> sa.compute(counts, edges)
    (array([6, 2, 2]), array([ 0., 27., 54., 81.]))
    """
    bins, range = _plain(bins), _plain(range)
    x = as_handle(a)
    w = None if weights is None else as_handle(weights)
    is_known = _is_known(x.dtype, "biuf") and (w is None or _is_known(w.dtype, "iufc"))
    if not is_known:
        return _by_numpy(np.histogram, x, bins, range, density, w)
    if w is not None and w.shape != x.shape:
        raise ValueError(f"weights should have the same shape as a: {w.shape} and {x.shape}")
    x = _subtractable(x)
    edges = histogram_bin_edges(x, bins, range, w)
    count = edges.shape[0] - 1
    dtype, final = (np.int64, np.dtype(np.int64)) if w is None else _like_weights(w)
    counts = cast(_cells("histogram", (max(0, count),), dtype, [x], [edges], w), final)
    if density:
        counts = counts / cast(edges[1:] - edges[:-1], float) / counts.sum()
    return counts, edges


def histogram_bin_edges(a: Any, bins: Any = 10, range: Any = None, weights: Any = None) -> Any:
    """Return the edges of the bins of `histogram`, of shape (n + 1,): lazy where they follow from the smallest and largest element.

    >>> import shmarray as sa
    >>> sa.histogram_bin_edges(sa.array([0.0, 1.0, 4.0]), bins=4).compute()
    array([0., 1., 2., 3., 4.])
    """
    bins, range = _plain(bins), _plain(range)
    x = as_handle(a)
    if isinstance(bins, str) or not _is_known(x.dtype, "biuf"):
        return _by_numpy(np.histogram_bin_edges, x, bins, range, weights)
    x = _subtractable(x)
    if np.ndim(bins) or range is not None or not x.size:
        return as_handle(np.histogram_bin_edges(np.empty(0, x.dtype), bins, range))
    count = len(np.histogram_bin_edges(np.empty(0), bins)) - 1  # NumPy says what it does not take
    return _edges_of(x, count, is_strict=True)


def histogramdd(sample: Any, bins: Any = 10, range: Any = None, density: Any = None, weights: Any = None) -> Any:
    """Return how many points lie in each cell of a grid of bins, of shape (n1, ..., nD) and, as NumPy's, of float64; and D arrays of edges.

    ``sample``: an array of shape (N, D), or D arrays of shape (N,), which take the dtype they have together. ``bins``: one number for all
    axes, or one entry for each, a number or edges; ``range``: a pair or None for each axis. ``weights`` (N,), ``density`` and which bin
    holds what as in `histogram`. Raises ValueError and TypeError as NumPy does.

    >>> import shmarray as sa
    >>> x, y = sa.array([0.5, 1.5, 1.5]), sa.array([0.1, 0.2, 0.9])
    >>> counts, edges = sa.histogramdd((x, y), bins=[2, 2], range=[(0, 2), (0, 1)])
    >>> counts.compute()
    array([[1., 0.],
           [1., 1.]])
    """
    bins, range = _plain(bins), _plain(range)
    columns = _columns(sample)
    dtype = np.result_type(*(c.dtype for c in columns)) if columns else np.dtype(float)
    w = None if weights is None else as_handle(weights)
    if not columns or not _is_known(dtype, "biuf") or (w is not None and not _is_known(w.dtype, "biuf")):
        whole = np.stack([np.asarray(c) for c in columns], axis=1) if columns else np.asarray(sample)
        counts, edges = np.histogramdd(whole, bins, range, density, None if w is None else np.asarray(w))
        return as_handle(counts), [as_handle(e) for e in edges]
    columns = [cast(c, np.uint8 if dtype.kind == "b" else dtype) for c in columns]
    n = columns[0].size
    if w is not None and w.shape != (n,):
        raise ValueError(f"The weights and list don't have the same length: weights of shape {w.shape} for {n} points")
    given = [None] * len(columns) if range is None else list(range)
    numbers = [bins] * len(columns) if _length(bins) is None else list(bins)
    # Edges that do not depend on the points, and what is wrong with any, by NumPy, for no points.
    _, known = np.histogramdd(np.empty((0, len(columns)), dtype), bins, range)
    tables = [
        as_handle(edges) if not n or one is not None or np.ndim(number) else _edges_of(column, len(edges) - 1, is_strict=False)
        for column, edges, one, number in zip(columns, known, given, numbers, strict=True)
    ]
    shape = tuple(max(0, t.shape[0] - 1) for t in tables)
    counts = cast(_cells("histogramdd", shape, np.int64 if w is None else np.float64, columns, tables, w), float)
    if density:
        total = counts.sum()
        for axis, edges in enumerate(tables):
            widths = edges[1:] - edges[:-1]
            counts = counts / widths[tuple(slice(None) if k == axis else None for k in np.arange(len(tables)))]
        counts = counts / total
    return counts, tables


def _columns(sample: Any) -> list[Any]:
    """Return the coordinates of the points, axis by axis."""
    if isinstance(sample, (Handle, np.ndarray)):
        whole = as_handle(sample)
        return [whole[:, k] for k in range(whole.shape[1])] if whole.ndim == 2 else [whole] if whole.ndim == 1 else []
    columns = [as_handle(c) for c in sample]
    if len({c.shape for c in columns}) > 1 or any(c.ndim != 1 for c in columns):
        raise ValueError(f"the coordinates of points are arrays of one length, these have the shapes {[c.shape for c in columns]}")
    return columns


def histogram2d(x: Any, y: Any, bins: Any = 10, range: Any = None, density: Any = None, weights: Any = None) -> Any:
    """Return how many points lie in each cell, of shape (nx, ny) and dtype float64; the edges along x; those along y.

    ``bins``: a number for both, the edges of both, or a pair of either; all else as in `histogramdd`.

    >>> import shmarray as sa
    >>> x, y = sa.array([0.5, 1.5, 1.5]), sa.array([0.1, 0.2, 0.9])
    >>> counts, xedges, yedges = sa.histogram2d(x, y, bins=2)
    >>> counts.compute()
    array([[1., 0.],
           [1., 1.]])
    """
    points = [as_handle(x), as_handle(y)]
    if points[0].shape[:1] != points[1].shape[:1]:
        raise ValueError(f"x and y must have the same length, they have the shapes {points[0].shape} and {points[1].shape}")
    bins = _plain(bins)
    if _length(bins) not in (None, 1, 2):
        bins = [np.asarray(bins)] * 2
    counts, (xedges, yedges) = histogramdd(points, bins, range, density, weights)
    return counts, xedges, yedges


def bincount(x: Any, /, weights: Any = None, minlength: int = 0) -> Any:
    """Return how often each number from 0 on occurs in ``x``, as an array of shape (max(largest + 1, minlength),) and dtype int64.

    ``x``: 1-d, of integers, not negative. Its largest element decides the shape and is computed at the call, in a pass of its own: if ``x``
    costs more than reading it, `persist` it first. ``weights``: what to add instead of 1; the result is float64 then. In a step
    of `iterate` the length is ``minlength``, and the task that meets a number that has no place there raises ValueError.

    Raises ValueError for negative numbers and other shapes, TypeError for dtypes that have no safe cast to int64, as NumPy does.

    >>> import shmarray as sa
    >>> sa.bincount(sa.array([1, 3, 1]), minlength=5).compute()
    array([0, 2, 0, 1, 0])
    """
    given = as_handle(x)
    w = None if weights is None else as_handle(weights)
    one = None if w is None else np.ones((1,) * w.ndim, w.dtype)
    least = np.bincount(np.zeros((1,) * given.ndim, given.dtype), one, minlength)  # NumPy says what it does not take
    if w is not None and w.shape != given.shape:
        raise ValueError(f"The weights and list don't have the same length: {w.shape[0]} and {given.shape[0]}")
    if not given.size:
        return as_handle(np.bincount(np.empty(0, np.intp), None if w is None else np.empty(0), minlength))
    cells = cast(given, np.intp)
    if is_traced(given):
        if not minlength:
            raise ValueError("bincount(x) of an array that has no values yet: in a step the length must be known: give minlength")
        return _cells("bincount", least.shape, least.dtype, [cells], (), w)
    low, high = compute(smallest(cells), largest(cells))
    if low < 0:
        raise ValueError(f"'list' argument must have no negative elements: bincount of an array of shape {given.shape} that holds {low}")
    return _cells("bincount", (max(int(high) + 1, len(least)),), least.dtype, [cells], (), w)


def digitize(x: Any, bins: Any, right: bool = False) -> Any:
    """Return, for each element of ``x``, the number of the bin it lies in: the ``i`` with ``bins[i - 1] <= x < bins[i]``; lazy, int64.

    ``bins``: the edges, 1-d, ascending or descending; an array that is not computed yet is computed at the call. ``right``: bins are
    closed on the right instead. Elements beyond the edges have 0 or ``len(bins)``. Raises ValueError, TypeError as NumPy does.

    >>> import shmarray as sa
    >>> sa.digitize(sa.array([0.2, 6.4, 3.0]), [0.0, 1.0, 2.5, 4.0]).compute()
    array([1, 4, 3])
    """
    edges = np.ascontiguousarray(_plain(bins))
    given = as_handle(x)
    np.digitize(np.empty(0, given.dtype), edges, right)  # NumPy says what it does not take
    if edges.dtype.kind not in "biufcmM":
        return _by_numpy(np.digitize, given, edges, right)
    return apply("digitize", given, edges=edges.tobytes(), edges_dtype=edges.dtype.str, right=bool(right))


# --- ufunc.at ---------------------------------------------------------------------------------------------------------------------


def at(ufunc: np.ufunc, x: Any, indices: Any, *values: Any) -> None:
    """Do ``ufunc.at(x, indices, values)`` to a stored array, in place: an index that occurs twice counts twice.

    Many indices of few elements (`MANY_INDICES`, `ITEMS_PER_CELL`) are brought together by tasks, cell by cell, and ``x`` is then updated
    exactly once; otherwise it is one call of NumPy on the memory of ``x``, under its lock. Sums of floats are rounded in another order than
    NumPy's in the first case, the same for any number of workers. Raises IndexError, before anything is written, as NumPy does.
    """
    update = _increments(ufunc, x, indices, values)
    if update is not None:
        name, increments = update
        x[...] = apply(name, x.live, increments)
        return
    key = _plain(indices)
    rest = [_plain(v) for v in values]
    if x.ndim == 1 and isinstance(key, (list, np.ndarray)) and np.ndim(key) > 1:
        # NumPy 2.4 reads beyond the values where it has to broadcast them here.
        rest = [np.array(np.broadcast_to(v, np.shape(key))) for v in rest]
    with x.lock() as memory:
        ufunc.at(memory, key, *rest)


def _increments(ufunc: np.ufunc, x: Any, indices: Any, values: tuple[Any, ...]) -> tuple[str, Any] | None:
    """Return the ufunc and the array to update ``x`` with, of its shape; None where that does not pay, or is not the same."""
    name = ufunc.__name__
    parts = indices if isinstance(indices, tuple) else (indices,)
    if name not in ACCUMULATED:
        return None
    if len(values) != 1 or len(parts) != x.ndim or not all(isinstance(p, (Handle, np.ndarray)) and p.dtype.kind in "iu" for p in parts):
        return None
    shape = broadcast_shape(*(p.shape for p in parts))
    if math.prod(shape) < max(MANY_INDICES, ITEMS_PER_CELL * x.size) or not x.size:
        return None
    added = as_handle(values[0])
    dtype = ufunc(np.ones(1, x.dtype), np.ones(1, added.dtype)).dtype
    if not _is_known(dtype, "biufc") or dtype == np.float16 or (dtype.kind == "c" and name in ("minimum", "maximum")):
        return None
    if dtype != x.dtype and (name not in ("add", "subtract", "multiply") or not np.can_cast(dtype, x.dtype, "same_kind")):
        return None  # NumPy casts back after each index, and what is lost there depends on their order
    added = broadcast_to(added, shape)
    numbers = [broadcast_to(p, shape) for p in parts]
    added = cast(added, dtype)
    if name == "subtract":
        name, added = "add", apply("negative", added)
    return name, _cells(f"{ufunc.__name__}.at", x.shape, dtype, numbers, (), added, name, is_at=True)


def at_traced(ufunc: np.ufunc, x: Any, indices: Any, *values: Any) -> None:
    """Do ``ufunc.at(x, indices, values)`` in a step of a simulation, where ``x`` is an expression: it becomes ``ufunc(x, increments)``.

    ``indices``: an array of integers or a tuple of them, for the leading axes. Integers are exact; sums of floats are rounded in another
    order than NumPy's, the same for any workers. Raises TypeError for what only a loop over the indices could do, IndexError where the
    task meets an index out of bounds.
    """
    name = ufunc.__name__
    if name not in ACCUMULATED or len(values) != 1:
        raise TypeError(f"{name}.at in a step of iterate(): the result of {', '.join(ACCUMULATED)} alone does not depend on the order")
    given = [p if isinstance(p, Handle) else np.asarray(p) for p in (indices if isinstance(indices, tuple) else (indices,))]
    if len(given) > x.ndim or any(p.dtype.kind not in "iu" for p in given):
        raise TypeError(
            f"{name}.at in a step of iterate() takes an array of integers, or a tuple of up to {x.ndim} of them, for the leading axes; for "
            f"slices give a view, {name}.at(x[1:], ...), for masks values that are multiplied with them"
        )
    added = as_handle(values[0])
    parts = [as_handle(p) for p in given]
    kept = x.shape[len(parts) :]
    parts = [p[(..., *(None,) * len(kept))] for p in parts] + [arange(n)[(..., *(None,) * (len(kept) - 1 - k))] for k, n in enumerate(kept)]
    shape = broadcast_shape(*(p.shape for p in parts))
    if not math.prod(shape):
        return
    if not x.size:
        raise IndexError(f"{name}.at: an array of shape {x.shape} has no element at any index")
    dtype = ufunc(np.ones(1, x.dtype), np.ones(1, added.dtype)).dtype
    if not _may_be_cast_last(name, dtype, x.dtype):
        raise TypeError(
            f"{name}.at of an array of {x.dtype} with values of {added.dtype} in a step of iterate(): NumPy casts after each index, and "
            f"what is lost there depends on their order; give values of {x.dtype}"
        )
    summed = np.dtype(np.float32) if dtype == np.float16 else dtype
    if not _is_known(summed, "biufc"):
        raise TypeError(f"{name}.at with numbers of {dtype} in a step of iterate()")
    added = cast(broadcast_to(added, shape), summed)
    if name == "subtract":
        added = apply("negative", added)
    numbers = [broadcast_to(p, shape) for p in parts]
    total = {"subtract": "add"}.get(name, name)
    increments = _cells(f"{name}.at", x.shape, summed, numbers, (), added, total, is_at=True)
    x._overwrite(apply(total, x, increments).node)


def _may_be_cast_last(name: str, dtype: np.dtype[Any], cells: np.dtype[Any]) -> bool:
    """Whether cells of ``cells`` that ``name`` computes in ``dtype`` can be cast when all is done, in place of after each item."""
    if name in ("minimum", "maximum"):  # which integers that wrap do not keep
        return dtype.kind != "c" and (dtype == cells or (dtype.kind == "f" and cells.kind == "f"))
    return dtype == cells or (dtype.kind in "iu" and cells.kind in "iu") or (dtype.kind in "fc" and dtype.kind == cells.kind)
