"""Reductions and scans of arrays, under NumPy's names and signatures.

Promises: dtypes, empty-input errors and NaN rules are NumPy's; bits depend on shape and dtype, never on chunks or workers.
To add a reduction, add a row to ``ops/reductions_table.py`` and, if NumPy has a function of that name, a line here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from shmarray.chunks import Chunks
from shmarray.expr import Expr, Reduction, Scan, View, make
from shmarray.handle import as_handle, in_memory, wrap
from shmarray.ops.elementwise import apply, cast, current_errstate, where, write_out
from shmarray.ops.reductions_table import REDUCTIONS
from shmarray.ops.shaping import broadcast_to, ravel
from shmarray.region import IndexMap, axis_tuple

__all__ = [
    "accumulate",
    "all",
    "amax",
    "amin",
    "any",
    "argmax",
    "argmin",
    "average",
    "count_nonzero",
    "cumprod",
    "cumsum",
    "diff",
    "max",
    "mean",
    "min",
    "nanmax",
    "nanmean",
    "nanmin",
    "nanprod",
    "nanstd",
    "nansum",
    "nanvar",
    "prod",
    "ptp",
    "reduce_ufunc",
    "std",
    "sum",
    "var",
]

_NO_VALUE: Any = type("NoValue", (), {"__repr__": lambda self: "<no value>"})()


def _reduce(kind: str, x: Any, axis: Any, dtype: np.dtype[Any], keepdims: bool, empty: Any, label: str = "", **params: Any) -> Any:
    """Return the reduction; ``empty`` is NumPy's function, asked when there is nothing to reduce."""
    x = as_handle(x)
    axes = axis_tuple(axis, x.ndim)
    out = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    keepdims = bool(keepdims)
    if math.prod(x.shape) == 0:
        value = empty(np.empty(x.shape, x.dtype), axis=axis if axis is None else axes)
        value = np.asarray(value, dtype).reshape(out)
        node: Expr = in_memory(value)
    elif not axes and x.ndim == 0:
        node = make(
            Reduction, (1,), dtype, kind, make(View, (1,), x.dtype, x.node, IndexMap((1,), (), ((-1, 0),))), (0,), _params(label, params)
        )
        return wrap(make(View, (), dtype, node, IndexMap((), (0,), ())))
    elif not axes:
        lifted = make(
            View, (*x.shape, 1), x.dtype, x.node, IndexMap((*x.shape, 1), (0,) * x.ndim, (*((k, 1) for k in range(x.ndim)), (-1, 0)))
        )
        node = make(Reduction, (*x.shape, 1), dtype, kind, lifted, (x.ndim,), _params(label, params))
        map = IndexMap(x.shape, (0,) * (x.ndim + 1), tuple((k, 1) for k in range(x.ndim)))
        return wrap(make(View, x.shape, dtype, node, map), x.chunks)
    else:
        node = make(Reduction, out, dtype, kind, x.node, axes, _params(label, params))
    chunks: Chunks = tuple((1,) if a in axes else c for a, c in enumerate(x.chunks))
    if keepdims:
        return wrap(node, chunks)
    kept = [a for a in range(x.ndim) if a not in axes]
    map = IndexMap(tuple(x.shape[a] for a in kept), (0,) * x.ndim, tuple((a, 1) for a in kept))
    return wrap(make(View, map.shape, dtype, node, map), tuple(chunks[a] for a in kept))


def _params(label: str, params: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    if label:
        params["label"] = label
    state = current_errstate()
    if state:
        params["errstate"] = state
    return tuple(sorted(params.items()))


def _like(function: Any, x: Any, **kwargs: Any) -> np.dtype[Any]:
    """Return the dtype NumPy's reduction gives for this dtype."""
    with np.errstate(all="ignore"):
        return np.asarray(function(np.ones(1, as_handle(x).dtype), **kwargs)).dtype


def _into(result: Any, out: Any) -> Any:
    """Return the result, written into ``out`` where that is given: reductions cast to whatever that is, in NumPy as well."""
    return write_out(result, out, casting="unsafe")


def _masked(x: Any, where_mask: Any, fill: Any) -> Any:
    if where_mask is _NO_VALUE or where_mask is True:
        return as_handle(x)
    x = as_handle(x)
    return where(where_mask, x, x.dtype.type(fill))


def _with_initial(result: Any, ufunc: str, initial: Any) -> Any:
    return result if initial is _NO_VALUE or initial is None else cast(apply(ufunc, result, initial), result.dtype)


def reduce_ufunc(
    ufunc: np.ufunc,
    x: Any,
    axis: Any = 0,
    dtype: Any = None,
    out: Any = None,
    keepdims: bool = False,
    initial: Any = _NO_VALUE,
    where: Any = True,
    **params: Any,
) -> Any:
    """Return ``ufunc.reduce(x, axis)``. Associative ufuncs run in parallel; others, whose order matters, as one call of NumPy."""
    x = as_handle(x)
    name = ufunc.__name__
    if name not in REDUCTIONS or (where is not True and ufunc.identity is None and initial is _NO_VALUE):
        kwargs = {} if initial is _NO_VALUE else {"initial": initial}
        if where is not True:  # NumPy asks ufuncs without identity for an initial= as soon as there is a mask
            kwargs["where"] = np.asarray(where)
        value = ufunc.reduce(np.asarray(x), axis=axis, dtype=dtype, keepdims=keepdims, **kwargs)
        return _into(as_handle(value), out)
    if where is not True:
        x = _masked(x, where, ufunc.identity if ufunc.identity is not None else initial)
    result_dtype = _like(ufunc.reduce, x, **({} if dtype is None else {"dtype": dtype}))
    if x.size == 0 and initial is not _NO_VALUE:
        value = ufunc.reduce(np.empty(x.shape, x.dtype), axis=axis, dtype=dtype, keepdims=keepdims, initial=initial)
        return _into(as_handle(value), out)
    given = x if dtype is None or name in ("add", "multiply") else cast(x, dtype)
    result = _reduce(
        name,
        given,
        axis,
        result_dtype,
        keepdims,
        lambda a, axis: ufunc.reduce(a, axis=axis, dtype=dtype, keepdims=True),
        "reduce",
        **params,
    )
    return _into(_with_initial(result, name, initial), out)


def sum(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, initial: Any = _NO_VALUE, where: Any = True
) -> Any:
    """Return the sum over ``axis`` (None: all), in a tree fixed by the shape: the same bits for any chunks and workers.

    >>> import shmarray as sa
    >>> sa.sum(sa.ones((3, 4)), axis=0).compute()
    array([3., 3., 3., 3.])
    """
    return reduce_ufunc(np.add, a, axis, dtype, out, keepdims, initial, where)


def prod(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, initial: Any = _NO_VALUE, where: Any = True
) -> Any:
    """Return the product over ``axis``."""
    return reduce_ufunc(np.multiply, a, axis, dtype, out, keepdims, initial, where)


def max(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False, initial: Any = _NO_VALUE, where: Any = True) -> Any:
    """Return the largest element over ``axis``; NaN wins. Raises ValueError for no elements, as NumPy does."""
    return reduce_ufunc(np.maximum, a, axis, None, out, keepdims, initial, where)


def min(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False, initial: Any = _NO_VALUE, where: Any = True) -> Any:
    """Return the smallest element over ``axis``; NaN wins. Raises ValueError for no elements, as NumPy does."""
    return reduce_ufunc(np.minimum, a, axis, None, out, keepdims, initial, where)


amax, amin = max, min


def any(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False, *, where: Any = True) -> Any:
    """Return whether any element over ``axis`` is true."""
    return reduce_ufunc(np.logical_or, a, axis, None, out, keepdims, _NO_VALUE, where)


def all(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False, *, where: Any = True) -> Any:
    """Return whether all elements over ``axis`` are true."""
    return reduce_ufunc(np.logical_and, a, axis, None, out, keepdims, _NO_VALUE, where)


def ptp(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
    """Return the range, largest minus smallest, over ``axis``."""
    return _into(max(a, axis, keepdims=keepdims) - min(a, axis, keepdims=keepdims), out)


def count_nonzero(a: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Return how many elements over ``axis`` are not zero."""
    x = as_handle(a)
    return sum(cast(x, bool) if x.dtype.kind not in "US" else x != x.dtype.type(), axis, dtype=np.intp, keepdims=keepdims)


def mean(a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, *, where: Any = True) -> Any:
    """Return the mean over ``axis``; of integers in float64.

    >>> import shmarray as sa
    >>> sa.mean(sa.arange(10)).compute()
    np.float64(4.5)
    """
    x = as_handle(a)
    if where is not True:
        total = sum(x, axis, dtype=dtype or _like(np.mean, x), keepdims=keepdims, where=where)
        return _into(total / _count_where(x, where, axis, keepdims), out)
    result = _like(np.mean, x, **({} if dtype is None else {"dtype": dtype}))
    return _into(_reduce("mean", x, axis, result, keepdims, lambda v, axis: np.mean(v, axis=axis, dtype=dtype, keepdims=True)), out)


def _count_where(x: Any, mask: Any, axis: Any, keepdims: bool) -> Any:
    return sum(cast(broadcast_to(as_handle(mask), x.shape), np.intp), axis, keepdims=keepdims)


def average(a: Any, axis: Any = None, weights: Any = None, keepdims: bool = False) -> Any:
    """Return the mean weighted by ``weights``, of the array's shape or one axis of it."""
    x = as_handle(a)
    if weights is None:
        return mean(x, axis, keepdims=keepdims)
    w = as_handle(weights)
    if w.shape != x.shape:
        if axis is None or w.ndim != 1:
            raise TypeError(f"Axis must be specified when shapes of a and weights differ: {x.shape} and {w.shape}")
        (only,) = axis_tuple(axis, x.ndim)
        if w.shape[0] != x.shape[only]:
            raise ValueError(f"Length of weights {w.shape[0]} not compatible with axis {axis} of length {x.shape[only]}")
        w = w[tuple(slice(None) if k == only else None for k in range(x.ndim))]
    total = sum(w, axis if w.ndim == x.ndim and w.shape == x.shape else None, keepdims=keepdims and w.shape == x.shape)
    return sum(x * w, axis, keepdims=keepdims) / total


def _spread(kind: str, numpy_function: Any, a: Any, axis: Any, dtype: Any, out: Any, ddof: Any, keepdims: bool, mask: Any = True) -> Any:
    x = as_handle(a)
    if dtype is not None and np.dtype(dtype).kind not in ("c" if x.dtype.kind == "c" else "fc"):
        # NumPy casts the mean on the way, and so must its answer be found: by NumPy.
        value = numpy_function(np.asarray(x), axis=axis, dtype=dtype, ddof=ddof, keepdims=keepdims, where=np.asarray(mask))
        return _into(as_handle(value), out)
    if mask is not True:
        return _into(_masked_spread(kind, numpy_function, x, axis, dtype, ddof, keepdims, mask), out)
    result = _like(numpy_function, x, **({} if dtype is None else {"dtype": dtype}))
    if dtype is not None and (x.dtype.kind != "c" or np.dtype(dtype).kind == "c"):
        x = cast(x, dtype)
    found = _reduce(kind, x, axis, result, keepdims, lambda v, axis: numpy_function(v, axis=axis, ddof=ddof, keepdims=True), ddof=ddof)
    return _into(found, out)


def _masked_spread(kind: str, numpy_function: Any, x: Any, axis: Any, dtype: Any, ddof: Any, keepdims: bool, mask: Any) -> Any:
    """Elements outside the mask count as NaN does in nanvar; NaN inside it still wins."""
    result = _like(numpy_function, x, **({} if dtype is None else {"dtype": dtype}))
    x = x if _is_inexact(x) else cast(x, float)
    chosen = where(mask, x, x.dtype.type(np.nan))
    spread = (nanvar if kind == "var" else nanstd)(chosen, axis, ddof=ddof, keepdims=keepdims)
    spoilt = any(apply("logical_and", apply("isnan", x), mask), axis, keepdims=keepdims)
    return cast(where(spoilt, spread.dtype.type(np.nan), spread), result)


def var(a: Any, axis: Any = None, dtype: Any = None, out: Any = None, ddof: float = 0, keepdims: bool = False, *, where: Any = True) -> Any:
    """Return the variance over ``axis``, divided by ``n - ddof``, by merging (n, mean, squared deviations) of parts in one pass.

    No cancellation where the mean is large: Chan, Golub and LeVeque (1979).
    """
    return _spread("var", np.var, a, axis, dtype, out, ddof, keepdims, where)


def std(a: Any, axis: Any = None, dtype: Any = None, out: Any = None, ddof: float = 0, keepdims: bool = False, *, where: Any = True) -> Any:
    """Return the standard deviation over ``axis``; see `var`."""
    return _spread("std", np.std, a, axis, dtype, out, ddof, keepdims, where)


def _is_inexact(x: Any) -> bool:
    return as_handle(x).dtype.kind in "fc"


def nansum(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, initial: Any = _NO_VALUE, where: Any = True
) -> Any:
    """Return the sum over ``axis`` with NaN taken as zero."""
    return sum(_no_nan(a, 0), axis, dtype, out, keepdims, initial, where)


def nanprod(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, initial: Any = _NO_VALUE, where: Any = True
) -> Any:
    """Return the product over ``axis`` with NaN taken as one."""
    return prod(_no_nan(a, 1), axis, dtype, out, keepdims, initial, where)


def _no_nan(a: Any, value: int) -> Any:
    x = as_handle(a)
    return where(apply("isnan", x), x.dtype.type(value), x) if _is_inexact(x) else x


def nanmax(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False, initial: Any = _NO_VALUE, where: Any = True) -> Any:
    """Return the largest element over ``axis``, NaN aside; NaN where there is nothing else."""
    return reduce_ufunc(np.fmax, a, axis, None, out, keepdims, initial, where, nan_warns=True)


def nanmin(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False, initial: Any = _NO_VALUE, where: Any = True) -> Any:
    """Return the smallest element over ``axis``, NaN aside; NaN where there is nothing else."""
    return reduce_ufunc(np.fmin, a, axis, None, out, keepdims, initial, where, nan_warns=True)


def nanmean(a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, *, where: Any = True) -> Any:
    """Return the mean over ``axis``, NaN aside."""
    x = as_handle(a)
    if not _is_inexact(x):
        return mean(x, axis, dtype, out, keepdims, where=where)
    if where is not True:
        x = apply("where", where, x, x.dtype.type(np.nan))
    if dtype is not None:
        x = cast(x, dtype)
    return _into(_reduce("nanmean", x, axis, x.dtype, keepdims, lambda v, axis: np.nanmean(v, axis=axis, keepdims=True)), out)


def _nanspread(
    kind: str, numpy_function: Any, plain: Any, a: Any, axis: Any, dtype: Any, out: Any, ddof: Any, keepdims: bool, mask: Any
) -> Any:
    x = as_handle(a)
    if dtype is not None:
        x = cast(x, dtype)
    if not _is_inexact(x):
        return plain(x, axis, None, out, ddof, keepdims, where=mask)
    if mask is not True:
        x = where(mask, x, x.dtype.type(np.nan))
    result = _like(numpy_function, x)
    found = _reduce(kind, x, axis, result, keepdims, lambda v, axis: numpy_function(v, axis=axis, ddof=ddof, keepdims=True), ddof=ddof)
    return _into(found, out)


def nanvar(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, ddof: float = 0, keepdims: bool = False, *, where: Any = True
) -> Any:
    """Return the variance over ``axis``, NaN aside; NaN where ``ddof`` or more are missing."""
    return _nanspread("nanvar", np.nanvar, var, a, axis, dtype, out, ddof, keepdims, where)


def nanstd(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, ddof: float = 0, keepdims: bool = False, *, where: Any = True
) -> Any:
    """Return the standard deviation over ``axis``, NaN aside."""
    return _nanspread("nanstd", np.nanstd, std, a, axis, dtype, out, ddof, keepdims, where)


def _arg(kind: str, numpy_function: Any, a: Any, axis: Any, out: Any, keepdims: bool) -> Any:
    x = as_handle(a)
    if axis is not None and not np.isscalar(axis):
        raise TypeError(f"'{type(axis).__name__}' object cannot be interpreted as an integer")
    dtype = np.dtype(np.intp)
    return _into(
        _reduce(kind, x, axis, dtype, keepdims, lambda v, axis: numpy_function(v, axis=None if axis is None else axis[0], keepdims=True)),
        out,
    )


def argmin(a: Any, axis: Any = None, out: Any = None, *, keepdims: bool = False) -> Any:
    """Return the index of the first smallest element, flat when ``axis`` is None; the first NaN wins."""
    return _arg("argmin", np.argmin, a, axis, out, keepdims)


def argmax(a: Any, axis: Any = None, out: Any = None, *, keepdims: bool = False) -> Any:
    """Return the index of the first largest element, flat when ``axis`` is None; the first NaN wins."""
    return _arg("argmax", np.argmax, a, axis, out, keepdims)


_SCANS = ("add", "multiply", "minimum", "maximum", "fmin", "fmax", "logical_or", "logical_and", "bitwise_or", "bitwise_and", "bitwise_xor")


def accumulate(ufunc: np.ufunc, a: Any, axis: int = 0, dtype: Any = None, out: Any = None) -> Any:
    """Return the running result of ``ufunc`` along ``axis``, as ``ufunc.accumulate``."""
    x = as_handle(a)
    if x.ndim == 0:
        raise TypeError("cannot accumulate on a scalar")
    (only,) = axis_tuple(axis, x.ndim)
    name = ufunc.__name__
    if name not in _SCANS:
        return _into(as_handle(ufunc.accumulate(x.compute(), axis=only, dtype=dtype)), out)
    result = _like(ufunc.accumulate, x, **({} if dtype is None else {"dtype": dtype}))
    if x.dtype != result and name not in ("add", "multiply"):
        x = cast(x, result)
    return _into(wrap(make(Scan, x.shape, result, name, x.node, only, current_errstate()), x.chunks), out)


def _cumulative(ufunc: np.ufunc, a: Any, axis: Any, dtype: Any, out: Any) -> Any:
    x = as_handle(a)
    if axis is None:
        x, axis = ravel(x), 0
    return accumulate(ufunc, x, axis, dtype, out)


def cumsum(a: Any, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
    """Return the running sum along ``axis`` (None: of the flattened array).

    >>> import shmarray as sa
    >>> sa.cumsum(sa.arange(5)).compute()
    array([ 0,  1,  3,  6, 10])
    """
    return _cumulative(np.add, a, axis, dtype, out)


def cumprod(a: Any, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
    """Return the running product along ``axis`` (None: of the flattened array)."""
    return _cumulative(np.multiply, a, axis, dtype, out)


def diff(a: Any, n: int = 1, axis: int = -1) -> Any:
    """Return the ``n``-th differences of neighbours along ``axis``, which becomes ``n`` shorter; of bool, whether they differ.

    Raises ValueError for an array without axes and for a negative ``n``.

    >>> import shmarray as sa
    >>> sa.diff(sa.asarray([1, 4, 9, 16])).compute()
    array([3, 5, 7])
    """
    x = as_handle(a)
    if n < 0:
        raise ValueError(f"order must be non-negative but got {n!r}")
    if not x.ndim:
        raise ValueError("diff requires input that is at least one dimensional")
    (only,) = axis_tuple(axis, x.ndim)
    before = (slice(None),) * only
    for _ in range(n):
        x = apply("not_equal" if x.dtype.kind == "b" else "subtract", x[(*before, slice(1, None))], x[(*before, slice(None, -1))])
    return x
