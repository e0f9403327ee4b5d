"""Functions of whole lines along one axis: ``sort``, ``median`` and their like.

Promises: one call of NumPy on an array that lies in memory; of one that lies in the spill file, a call per block of lines, where an axis
is given that is not the only one. NumPy's values either way, computed at once.
Never put here: what can be done piece by piece along the line (``reductions``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from shmarray.expr import Block, BlockOperation, make
from shmarray.handle import as_handle, wrap
from shmarray.ops.gather import block_nbytes, cut, spilling_pool
from shmarray.ops.shaping import squeeze
from shmarray.region import Box, axis_tuple

__all__ = ["argsort", "median", "nanmedian", "nanpercentile", "nanquantile", "percentile", "quantile", "sort"]


class _Lines(BlockOperation):
    """A function of lines along ``axis``, which gives lines of ``length``."""

    memory_inputs = True

    def __init__(
        self, function: Callable[..., Any], shape: tuple[int, ...], dtype: np.dtype[Any], axis: int, length: int, nbytes: int, more: Any
    ) -> None:
        self.function, self.axis, self.more = function, axis, more
        self.name, self.itemsize, self.n = function.__name__, dtype.itemsize, shape[axis]
        sizes = cut(shape, nbytes // max(dtype.itemsize, 8), axis)
        self.sizes = (*sizes[:axis], (length,), *sizes[axis + 1 :])

    def grid(self) -> tuple[tuple[int, ...], ...]:
        return self.sizes

    def needs(self, at: Box) -> tuple[Box, ...]:
        return ((*at[: self.axis], slice(0, self.n), *at[self.axis + 1 :]),)

    def run(self, out: np.ndarray[Any, Any], inputs: tuple[np.ndarray[Any, Any], ...], at: Box) -> None:
        out[...] = self.function(inputs[0], axis=self.axis, **self.more)

    def _items(self, at: Box) -> int:
        return int(self.n * math.prod(s.stop - s.start for a, s in enumerate(at) if a != self.axis))

    def scratch(self, at: Box) -> int:
        return 3 * self._items(at) * max(self.itemsize, 8)

    def cost(self, at: Box) -> int:
        return 32 * self._items(at) * self.itemsize


def _along(function: Callable[..., Any], a: Any, axis: Any, *, is_reduced: bool, keepdims: bool = False, **more: Any) -> Any:
    x = as_handle(a)
    pool = spilling_pool(x)
    if pool is None or not isinstance(axis, (int, np.integer)) or x.ndim < 2 or not x.size:
        if is_reduced:
            more["keepdims"] = keepdims
        whole = function(np.asarray(x), axis=axis, **more)
        return as_handle(whole) if isinstance(whole, np.ndarray) and whole.ndim else whole
    (only,) = axis_tuple(int(axis), x.ndim)
    if is_reduced:
        more["keepdims"] = True
    dtype = function(np.ones((1,) * x.ndim, x.dtype), axis=only, **more).dtype
    length = 1 if is_reduced else x.shape[only]
    shape = tuple(length if k == only else n for k, n in enumerate(x.shape))
    nbytes = block_nbytes(pool, math.prod(shape) * dtype.itemsize)
    operation = _Lines(function, x.shape, x.dtype, only, length, nbytes, more)
    node = make(Block, shape, dtype, operation, (x.node,), (function, only, x.shape, operation.sizes, tuple(sorted(more.items()))))
    result = wrap(node).persist()
    return squeeze(result, only) if is_reduced and not keepdims else result


def sort(a: Any, axis: int | None = -1, kind: Any = None, order: Any = None, *, stable: bool | None = None) -> Any:
    """Return a sorted copy of ``a`` along ``axis`` (None: flattened), computed now.

    >>> import shmarray as sa
    >>> sa.sort(sa.asarray([[3, 1, 2]])).compute()
    array([[1, 2, 3]])
    """
    return _along(np.sort, a, axis, is_reduced=False, kind=kind, order=order, stable=stable)


def argsort(a: Any, axis: int | None = -1, kind: Any = None, order: Any = None, *, stable: bool | None = None) -> Any:
    """Return the indices that would sort ``a`` along ``axis`` (None: flattened), computed now."""
    return _along(np.argsort, a, axis, is_reduced=False, kind=kind, order=order, stable=stable)


def median(a: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Return the median along ``axis`` (None: of all), computed now.

    >>> import shmarray as sa
    >>> sa.median(sa.asarray([[3, 1, 2], [6, 5, 9]]), axis=1).compute()
    array([2., 6.])
    """
    return _along(np.median, a, axis, is_reduced=True, keepdims=keepdims)


def nanmedian(a: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Return the median along ``axis``, NaN aside, computed now."""
    return _along(np.nanmedian, a, axis, is_reduced=True, keepdims=keepdims)


def _quantile(function: Callable[..., Any], a: Any, q: Any, axis: Any, method: str, keepdims: bool) -> Any:
    if not isinstance(q, (bool, int, float, np.number)):  # several: an axis of their own, in one call of NumPy
        found = function(np.asarray(as_handle(a)), np.asarray(q), axis=axis, method=method, keepdims=keepdims)
        return as_handle(found)
    return _along(function, a, axis, is_reduced=True, keepdims=keepdims, q=q, method=method)


def quantile(a: Any, q: Any, axis: Any = None, *, method: str = "linear", keepdims: bool = False) -> Any:
    """Return the ``q``-quantile (0 to 1) along ``axis`` (None: of all), computed now.

    >>> import shmarray as sa
    >>> float(sa.quantile(sa.arange(5.0), 0.25))
    1.0
    """
    return _quantile(np.quantile, a, q, axis, method, keepdims)


def nanquantile(a: Any, q: Any, axis: Any = None, *, method: str = "linear", keepdims: bool = False) -> Any:
    """Return the ``q``-quantile (0 to 1) along ``axis``, NaN aside, computed now."""
    return _quantile(np.nanquantile, a, q, axis, method, keepdims)


def percentile(a: Any, q: Any, axis: Any = None, *, method: str = "linear", keepdims: bool = False) -> Any:
    """Return the percentile ``q`` (0 to 100) along ``axis`` (None: of all), computed now."""
    return _quantile(np.percentile, a, q, axis, method, keepdims)


def nanpercentile(a: Any, q: Any, axis: Any = None, *, method: str = "linear", keepdims: bool = False) -> Any:
    """Return the percentile ``q`` (0 to 100) along ``axis``, NaN aside, computed now."""
    return _quantile(np.nanpercentile, a, q, axis, method, keepdims)
