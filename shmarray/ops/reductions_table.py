"""The table of reductions: one declarative value each, and the one place to add one.

A reduction keeps *states*: ``leaf`` makes them from one block, ``combine`` merges those of two neighbours, ``finish`` makes the
result. Blocks and their order are fixed by the grid, so bits do not depend on who computes what. States have the reduced axes
kept with length 1, and so has the result.
Never put here: grids, memory, how a user calls it (``reductions``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from shmarray.region import Box

__all__ = ["REDUCTIONS", "ReductionRow"]

NDArray = np.ndarray[Any, Any]
States = tuple[NDArray, ...]
Params = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """Where a block lies: its box, the whole shape, the reduced axes."""

    box: Box
    shape: tuple[int, ...]
    axes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReductionRow:
    """``states(input dtype, result dtype)`` gives the dtypes of the states; counts are how many items each side has seen."""

    name: str
    states: Callable[[np.dtype[Any], np.dtype[Any]], tuple[np.dtype[Any], ...]]
    leaf: Callable[[NDArray, Part, tuple[np.dtype[Any], ...], Params], States]
    combine: Callable[[States, States, int, int], States]
    finish: Callable[[States, int, np.dtype[Any], Params], NDArray]


def _accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """float16 sums are kept in float32, as NumPy's are within a run."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def _only(states: States, count: int, dtype: np.dtype[Any], params: Params) -> NDArray:
    if params.get("nan_warns") and (states[0] != states[0]).any():
        warnings.warn("All-NaN slice encountered", RuntimeWarning, stacklevel=2)
    return states[0].astype(dtype, copy=False)


def _is_count(x: NDArray, part: Part, result: np.dtype[Any]) -> bool:
    """Whether the sum of ``x`` is one count of what is true: exact in every dtype, and six times as fast as adding."""
    return x.dtype == np.bool_ and result.kind in "iufc" and all(n == 1 for a, n in enumerate(x.shape) if a not in part.axes)


def _number_true(x: NDArray, dtype: np.dtype[Any]) -> NDArray:
    return np.array(np.count_nonzero(x), ndmin=x.ndim).astype(dtype, copy=False)


def _of_ufunc(name: str, *, wide: bool) -> ReductionRow:
    """The reduction of an associative ufunc. ``wide``: the state has the result's dtype (sums), else the input's (minimum)."""
    ufunc = getattr(np, name)

    def states(given: np.dtype[Any], result: np.dtype[Any]) -> tuple[np.dtype[Any], ...]:
        return (_accumulator(result),)

    def leaf(x: NDArray, part: Part, dtypes: tuple[np.dtype[Any], ...], params: Params) -> States:
        dtype = dtypes[0] if wide and x.dtype.kind != "m" else None  # of time units NumPy takes no dtype=
        if ufunc is np.add and _is_count(x, part, dtypes[0]):
            return (_number_true(x, dtypes[0]),)
        return (ufunc.reduce(x, axis=part.axes, dtype=dtype, keepdims=True),)

    def combine(a: States, b: States, na: int, nb: int) -> States:
        return (ufunc(a[0], b[0]),)

    return ReductionRow(name, states, leaf, combine, _only)


def _mean() -> ReductionRow:
    def states(given: np.dtype[Any], result: np.dtype[Any]) -> tuple[np.dtype[Any], ...]:
        return (_accumulator(result),)

    def leaf(x: NDArray, part: Part, dtypes: tuple[np.dtype[Any], ...], params: Params) -> States:
        if _is_count(x, part, dtypes[0]):
            return (_number_true(x, dtypes[0]),)
        return (np.add.reduce(x, axis=part.axes, dtype=None if x.dtype.kind == "m" else dtypes[0], keepdims=True),)

    def combine(a: States, b: States, na: int, nb: int) -> States:
        return (a[0] + b[0],)

    def finish(states: States, count: int, dtype: np.dtype[Any], params: Params) -> NDArray:
        return np.asarray(states[0] / (count if dtype.kind == "m" else states[0].dtype.type(count))).astype(dtype, copy=False)

    return ReductionRow("mean", states, leaf, combine, finish)


def _wide_float(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that means and moments are merged in: at least double precision."""
    return np.result_type(dtype, np.float64)


def _real(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.empty(0, dtype).real.dtype


def _square(x: NDArray) -> NDArray:
    """|x|^2, written over x where it is real."""
    if x.dtype.kind == "c":
        squared: NDArray = np.square(x.real)
        squared += np.square(x.imag)
        return squared
    product: NDArray = np.multiply(x, x, out=x)
    return product


def _merge_moments(a: States, b: States, na: Any, nb: Any) -> tuple[NDArray, NDArray]:
    """Merge (mean, sum of squared deviations) of two parts.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979): no
    cancellation where mean is large beside the spread, as a sum of squares has.
    """
    total = na + nb
    delta = b[0] - a[0]
    mean = a[0] + delta * (nb / total)
    squares = a[1] + b[1] + np.square(np.abs(delta)) * (na * nb / total)
    return mean, squares


def _spread(name: str, root: bool) -> ReductionRow:
    def states(given: np.dtype[Any], result: np.dtype[Any]) -> tuple[np.dtype[Any], ...]:
        mean = np.result_type(given, np.float64) if given.kind in "biu" else given
        return _wide_float(mean), _wide_float(_real(mean))

    def leaf(x: NDArray, part: Part, dtypes: tuple[np.dtype[Any], ...], params: Params) -> States:
        count = math.prod(x.shape[a] for a in part.axes)
        if x.dtype.kind in "biu" or x.dtype == np.float16:
            x = x.astype(np.float64 if x.dtype.kind != "f" else np.float32)
        mean = np.add.reduce(x, axis=part.axes, keepdims=True) / x.dtype.type(count)
        squares = np.add.reduce(_square(x - mean), axis=part.axes, keepdims=True)
        return mean.astype(dtypes[0], copy=False), squares.astype(dtypes[1], copy=False)

    def combine(a: States, b: States, na: int, nb: int) -> States:
        return _merge_moments(a, b, na, nb)

    def finish(states: States, count: int, dtype: np.dtype[Any], params: Params) -> NDArray:
        variance = np.asarray(states[1] / np.float64(max(count - params.get("ddof", 0), 0)))
        result: NDArray = np.sqrt(variance) if root else variance
        return result.astype(dtype, copy=False)

    return ReductionRow(name, states, leaf, combine, finish)


def _not_nan(x: NDArray) -> NDArray:
    here: NDArray = x == x
    return here


def _count(x: NDArray, part: Part) -> NDArray:
    count: NDArray = np.add.reduce(_not_nan(x), axis=part.axes, dtype=np.int64, keepdims=True)
    return count


def _nanmean() -> ReductionRow:
    def states(given: np.dtype[Any], result: np.dtype[Any]) -> tuple[np.dtype[Any], ...]:
        return _accumulator(result), np.dtype(np.int64)

    def leaf(x: NDArray, part: Part, dtypes: tuple[np.dtype[Any], ...], params: Params) -> States:
        filled = np.where(_not_nan(x), x, x.dtype.type(0))
        return np.add.reduce(filled, axis=part.axes, dtype=dtypes[0], keepdims=True), _count(x, part)

    def combine(a: States, b: States, na: int, nb: int) -> States:
        return a[0] + b[0], a[1] + b[1]

    def finish(states: States, count: int, dtype: np.dtype[Any], params: Params) -> NDArray:
        # Of nothing but NaN: 0 / 0, with the warning that NumPy gives, too.
        return np.asarray(states[0] / states[1].astype(_real(states[0].dtype))).astype(dtype, copy=False)

    return ReductionRow("nanmean", states, leaf, combine, finish)


def _nanspread(name: str, root: bool) -> ReductionRow:
    def states(given: np.dtype[Any], result: np.dtype[Any]) -> tuple[np.dtype[Any], ...]:
        return _wide_float(given), _wide_float(_real(given)), np.dtype(np.int64)

    def leaf(x: NDArray, part: Part, dtypes: tuple[np.dtype[Any], ...], params: Params) -> States:
        if x.dtype == np.float16:
            x = x.astype(np.float32)
        here = _not_nan(x)
        count = np.add.reduce(here, axis=part.axes, dtype=np.int64, keepdims=True)
        zero = x.dtype.type(0)
        mean = np.add.reduce(np.where(here, x, zero), axis=part.axes, keepdims=True) / np.maximum(count, 1).astype(_real(x.dtype))
        squares = np.add.reduce(_square(np.where(here, x - mean, zero)), axis=part.axes, keepdims=True)
        return mean.astype(dtypes[0], copy=False), squares.astype(dtypes[1], copy=False), count

    def combine(a: States, b: States, na: int, nb: int) -> States:
        some = np.maximum(a[2] + b[2], 1).astype(np.float64)
        ca, cb = a[2].astype(np.float64), b[2].astype(np.float64)
        delta = b[0] - a[0]
        mean = np.where(a[2] == 0, b[0], a[0] + np.where(b[2] == 0, 0, delta) * (cb / some))
        cross = np.where((a[2] == 0) | (b[2] == 0), 0, np.square(np.abs(delta)) * (ca * cb / some))
        return mean, a[1] + b[1] + cross, a[2] + b[2]

    def finish(states: States, count: int, dtype: np.dtype[Any], params: Params) -> NDArray:
        left = states[2] - params.get("ddof", 0)
        variance = np.where(left > 0, states[1] / np.maximum(left, 0).astype(np.float64), np.nan)
        result: NDArray = np.sqrt(variance) if root else variance
        return result.astype(dtype, copy=False)

    return ReductionRow(name, states, leaf, combine, finish)


def _arg(name: str, better: Callable[[NDArray, NDArray], NDArray]) -> ReductionRow:
    """argmin and argmax: the value so far and its index, flat over the reduced axes in C order. The first NaN wins."""
    function = getattr(np, name)

    def states(given: np.dtype[Any], result: np.dtype[Any]) -> tuple[np.dtype[Any], ...]:
        return given, np.dtype(np.int64)

    def leaf(x: NDArray, part: Part, dtypes: tuple[np.dtype[Any], ...], params: Params) -> States:
        out = tuple(1 if a in part.axes else n for a, n in enumerate(x.shape))
        if len(part.axes) == 1:
            (axis,) = part.axes
            local = function(x, axis=axis, keepdims=True)
            return np.take_along_axis(x, local, axis), local + part.box[axis].start
        kept = [a for a in range(x.ndim) if a not in part.axes]
        moved = x.transpose([*kept, *part.axes])
        lead = moved.shape[: len(kept)]
        flat = moved.reshape((*lead, -1))
        local = function(flat, axis=-1)
        value = np.take_along_axis(flat, local[..., None], -1)[..., 0]
        where = np.unravel_index(local, moved.shape[len(kept) :])
        index = np.zeros(lead, np.int64)
        for a, w in zip(part.axes, where, strict=True):
            index = index * part.shape[a] + (w + part.box[a].start)
        return value.reshape(out), index.reshape(out)

    def combine(a: States, b: States, na: int, nb: int) -> States:
        (va, ia), (vb, ib) = a, b
        nan_a, nan_b = va != va, vb != vb
        take = np.where(nan_a | nan_b, nan_b & (~nan_a | (ib < ia)), better(vb, va) | ((va == vb) & (ib < ia)))
        return np.where(take, vb, va), np.where(take, ib, ia)

    def finish(states: States, count: int, dtype: np.dtype[Any], params: Params) -> NDArray:
        return states[1].astype(dtype, copy=False)

    return ReductionRow(name, states, leaf, combine, finish)


_WIDE = ("add", "multiply", "hypot", "logaddexp", "logaddexp2")
_NARROW = ("minimum", "maximum", "fmin", "fmax", "gcd", "lcm")
_TRUTH = ("logical_or", "logical_and", "logical_xor", "bitwise_or", "bitwise_and", "bitwise_xor")

REDUCTIONS = MappingProxyType(
    {
        row.name: row
        for row in (
            *(_of_ufunc(name, wide=True) for name in _WIDE),
            *(_of_ufunc(name, wide=False) for name in (*_NARROW, *_TRUTH)),
            _mean(),
            _spread("var", root=False),
            _spread("std", root=True),
            _nanmean(),
            _nanspread("nanvar", root=False),
            _nanspread("nanstd", root=True),
            _arg("argmin", np.less),
            _arg("argmax", np.greater),
        )
    }
)
