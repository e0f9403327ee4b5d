"""Arrays from nothing but positions, and from data: NumPy arrays, files, anything that can be sliced.

Never put here: random numbers (``random``), what a fill becomes in a kernel.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from shmarray.chunks import Chunks, normalize_chunks
from shmarray.compute import new_stored
from shmarray.dtypes import checked_dtype
from shmarray.expr import Block, BlockOperation, Expr, Fill, FillOperation, Foreign, View, exact, make
from shmarray.handle import Handle, as_handle, as_node, in_memory, is_linking, refuse_masked, value_of, wrap
from shmarray.ops.elementwise import cast
from shmarray.ops.shaping import broadcast_to, stack
from shmarray.region import Box, IndexMap
from shmarray.shared_memory import SharedArray, lease_of, stored

__all__ = [
    "arange",
    "array",
    "asanyarray",
    "asarray",
    "ascontiguousarray",
    "empty",
    "empty_like",
    "eye",
    "from_array",
    "fromfunction",
    "full",
    "full_like",
    "identity",
    "indices",
    "linspace",
    "ones",
    "ones_like",
    "zeros",
    "zeros_like",
]


def _shape(shape: Any) -> tuple[int, ...]:
    sizes = shape if isinstance(shape, (tuple, list, np.ndarray)) and np.ndim(shape) else (shape,)
    result = tuple(operator.index(n) for n in sizes)
    if any(n < 0 for n in result):
        raise ValueError(f"negative dimensions are not allowed: shape {result}")
    return result


class _Constant(FillOperation):
    cost = 0

    def __init__(self, value: np.generic, name: str) -> None:
        self.value = value
        self.name = name

    def fill(self, out: np.ndarray[Any, Any], starts: tuple[int, ...], steps: tuple[int, ...]) -> None:
        out[...] = self.value


def _constant(shape: Any, value: Any, dtype: Any, chunks: Any, name: str) -> Any:
    """Return a fill; ``value`` None: what the dtype has for zero, an empty string among them."""
    whole = _shape(shape)
    dtype = checked_dtype(dtype)
    scalar: Any = np.full((), value, dtype)[()] if value is not None else np.zeros((), dtype)[()]
    node = make(Fill, whole, dtype, _operation(_Constant, scalar, name), (name, scalar))
    return wrap(node, normalize_chunks(chunks, whole, dtype))


_operations: dict[Any, FillOperation] = {}


def _operation(kind: Callable[..., FillOperation], *args: Any) -> FillOperation:
    """Return one operation per kind and arguments, so that equal fills are one node; a bounded table."""
    key = (kind, exact(args))
    found = _operations.get(key)
    if found is None:
        if len(_operations) > 1024:
            _operations.clear()
        found = _operations[key] = kind(*args)
    return found


def zeros(shape: Any, dtype: Any = float, order: str = "C", *, chunks: Any = "auto", like: Any = None) -> Any:
    """Return an array of zeros. It takes no memory until it is stored."""
    return _constant(shape, None, dtype, chunks, "zeros")


def ones(shape: Any, dtype: Any = float, order: str = "C", *, chunks: Any = "auto", like: Any = None) -> Any:
    """Return an array of ones."""
    return _constant(shape, 1, dtype, chunks, "ones")


def empty(shape: Any, dtype: Any = float, order: str = "C", *, chunks: Any = "auto", like: Any = None) -> Any:
    """Return an array to be filled. Here its elements are zero: workers hand out no stale memory."""
    return _constant(shape, None, dtype, chunks, "empty")


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C", *, chunks: Any = "auto", like: Any = None) -> Any:
    """Return an array of one value; ``dtype`` None: that of the value."""
    value = as_node(fill_value, "fill_value")
    if isinstance(value, Expr):
        if value.shape:
            whole = _shape(shape)
            spread = broadcast_to(as_handle(fill_value), whole).rechunk(normalize_chunks(chunks, whole, value.dtype))
            return value_of(spread if dtype is None else cast(spread, dtype))
        value = as_handle(fill_value).compute()
    return _constant(shape, value, np.asarray(value).dtype if dtype is None else dtype, chunks, "full")


def _like(a: Any, value: Any, dtype: Any, shape: Any, chunks: Any, name: str) -> Any:
    x = as_handle(a)
    if chunks is None:
        chunks = x.chunks if shape is None else "auto"
    return _constant(x.shape if shape is None else shape, value, x.dtype if dtype is None else dtype, chunks, name)


def zeros_like(a: Any, dtype: Any = None, order: str = "K", subok: bool = True, shape: Any = None, *, chunks: Any = None) -> Any:
    """Return zeros of the shape, dtype and chunks of ``a``, each unless given."""
    return _like(a, None, dtype, shape, chunks, "zeros")


def ones_like(a: Any, dtype: Any = None, order: str = "K", subok: bool = True, shape: Any = None, *, chunks: Any = None) -> Any:
    """Return ones of the shape, dtype and chunks of ``a``, each unless given."""
    return _like(a, 1, dtype, shape, chunks, "ones")


def empty_like(a: Any, dtype: Any = None, order: str = "K", subok: bool = True, shape: Any = None, *, chunks: Any = None) -> Any:
    """Return an array to be filled, of the shape, dtype and chunks of ``a``, each unless given."""
    return _like(a, None, dtype, shape, chunks, "empty")


def full_like(
    a: Any, fill_value: Any, dtype: Any = None, order: str = "K", subok: bool = True, shape: Any = None, *, chunks: Any = None
) -> Any:
    """Return an array of one value, of the shape, dtype and chunks of ``a``, each unless given."""
    x = as_handle(a)
    return full(
        x.shape if shape is None else shape,
        fill_value,
        x.dtype if dtype is None else dtype,
        chunks=x.chunks if chunks is None and shape is None else chunks or "auto",
    )


class _Range(FillOperation):
    """start + step * index, as NumPy's arange computes it: in the dtype, from the first two elements."""

    name = "arange"

    def __init__(self, first: Any, step: Any, dtype: np.dtype[Any]) -> None:
        self.first, self.step, self.dtype = first, step, dtype

    def fill(self, out: np.ndarray[Any, Any], starts: tuple[int, ...], steps: tuple[int, ...]) -> None:
        index = np.arange(len(out), dtype=np.int64) * steps[0] + starts[0]
        if self.dtype.kind in "iu":
            np.add(index.astype(self.dtype, copy=False) * self.step, self.first, out=out, casting="unsafe")
        else:
            np.copyto(
                out,
                self.first + index.astype(np.result_type(self.dtype, np.float32) if self.dtype.kind == "f" else self.dtype) * self.step,
                casting="unsafe",
            )


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None, *, chunks: Any = "auto", like: Any = None) -> Any:
    """Return evenly spaced values in [start, stop).

    >>> import shmarray as sa
    >>> sa.arange(2, 8, 2).compute()
    array([2, 4, 6])
    """
    if stop is None:
        start, stop = 0, start
    kind = checked_dtype(
        np.arange(*[type(v)(1) if isinstance(v, (int, float)) else v for v in (start, stop, step)]).dtype if dtype is None else dtype
    )
    if step == 0:
        raise ZeroDivisionError("arange with a step of 0")
    if kind.kind in "mM":  # dates, days, their mixtures: NumPy's rules, and seldom many
        return asarray(np.arange(start, stop, step, dtype=dtype)).rechunk(chunks)
    n = max(0, math.ceil((stop - start) / step))
    if kind.kind == "b" or n <= 2:
        return asarray(np.arange(start, stop, step, dtype=kind))
    few = np.arange(start, start + 2 * step, step, dtype=kind)  # NumPy goes on from its first two elements
    first, delta = few[0], few[1] - few[0]
    node = make(Fill, (n,), kind, _operation(_Range, first, delta, kind), ("arange", first, delta))
    return wrap(node, normalize_chunks(chunks, (n,), kind))


class _Linspace(FillOperation):
    name = "linspace"

    def __init__(self, start: Any, stop: Any, step: Any, num: int, endpoint: bool, integer: bool) -> None:
        self.start, self.stop, self.step, self.num, self.endpoint, self.integer = start, stop, step, num, endpoint, integer

    def fill(self, out: np.ndarray[Any, Any], starts: tuple[int, ...], steps: tuple[int, ...]) -> None:
        index = np.arange(len(out), dtype=np.int64) * steps[0] + starts[0]
        values = index * self.step + self.start
        if self.endpoint and self.num > 1:
            values[index == self.num - 1] = self.stop
        np.copyto(out, np.floor(values) if self.integer else values, casting="unsafe")


def linspace(
    start: Any, stop: Any, num: int = 50, endpoint: bool = True, retstep: bool = False, dtype: Any = None, *, chunks: Any = "auto"
) -> Any:
    """Return ``num`` evenly spaced numbers from ``start`` to ``stop``, with the last one unless ``endpoint`` is False."""
    num = operator.index(num)
    if num < 0:
        raise ValueError(f"Number of samples, {num}, must be non-negative.")
    if np.ndim(start) or np.ndim(stop):
        raise ValueError(f"linspace takes two numbers, got shapes {np.shape(start)} and {np.shape(stop)}")
    inferred = np.result_type(start, stop, float(num))
    if inferred.kind in "iub":
        inferred = np.dtype(float)
    kind = inferred if dtype is None else checked_dtype(dtype)
    first, last = inferred.type(start), inferred.type(stop)
    parts = num - 1 if endpoint else num
    step = (last - first) / parts if parts > 0 else inferred.type(np.nan)
    operation = _operation(_Linspace, first, last, step if parts > 0 else last - first, num, endpoint, kind.kind in "iu")
    node = make(Fill, (num,), kind, operation, ("linspace", first, last, num, endpoint, kind))
    result = wrap(node, normalize_chunks(chunks, (num,), kind))
    return (result, step) if retstep else result


class _Eye(FillOperation):
    name = "eye"

    def __init__(self, k: int) -> None:
        self.k = k

    def fill(self, out: np.ndarray[Any, Any], starts: tuple[int, ...], steps: tuple[int, ...]) -> None:
        rows = np.arange(out.shape[0]) * steps[0] + starts[0]
        columns = np.arange(out.shape[1]) * steps[1] + starts[1]
        np.copyto(out, rows[:, None] + self.k == columns, casting="unsafe")


def eye(N: int, M: int | None = None, k: int = 0, dtype: Any = float, *, chunks: Any = "auto") -> Any:  # noqa: N803  # NumPy's names
    """Return a 2-D array with ones on diagonal ``k`` and zeros elsewhere."""
    shape = _shape((N, N if M is None else M))
    dtype = checked_dtype(dtype)
    node = make(Fill, shape, dtype, _operation(_Eye, operator.index(k)), ("eye", k))
    return wrap(node, normalize_chunks(chunks, shape, dtype))


def identity(n: int, dtype: Any = float, *, chunks: Any = "auto") -> Any:
    """Return the identity matrix."""
    return eye(n, dtype=dtype, chunks=chunks)


class _FromFunction(BlockOperation):
    """A user's function of index arrays, called for one chunk at a time."""

    isolated = True

    def __init__(self, function: Callable[..., Any], sizes: Chunks, dtype: Any, kwargs: dict[str, Any]) -> None:
        self.function, self.sizes, self.dtype, self.kwargs = function, sizes, dtype, kwargs
        self.name = f"fromfunction({getattr(function, '__name__', function)})"

    def grid(self) -> Chunks:
        return self.sizes

    def needs(self, at: Box) -> tuple[Box, ...]:
        return ()

    def run(self, out: np.ndarray[Any, Any], inputs: tuple[np.ndarray[Any, Any], ...], at: Box) -> None:
        index = np.indices([s.stop - s.start for s in at], dtype=self.dtype)
        for axis, piece in enumerate(at):
            index[axis] += np.asarray(piece.start).astype(self.dtype)
        out[...] = self.function(*index, **self.kwargs)


def fromfunction(function: Callable[..., Any], shape: Any, *, dtype: Any = float, chunks: Any = "auto", **kwargs: Any) -> Any:
    """Return ``function`` of the indices of each element, called once per chunk with one index array per axis.

    ``dtype`` is that of the index arrays, as in NumPy; the result's is found by calling the function on one element.
    """
    whole = _shape(shape)
    probe = np.asarray(function(*np.zeros((len(whole),) + (1,) * len(whole), dtype), **kwargs))
    kind = checked_dtype(probe.dtype, "the result of the function")
    sizes = normalize_chunks(chunks, whole, kind)
    operation = _FromFunction(function, sizes, dtype, kwargs)
    return wrap(make(Block, whole, kind, operation, (), ("fromfunction", operation)), sizes)


def indices(dimensions: Any, dtype: Any = int, *, chunks: Any = "auto") -> Any:
    """Return the index of each element along each axis, stacked along a new first axis."""
    shape = _shape(dimensions)
    parts = []
    for axis, n in enumerate(shape):
        line = arange(n, dtype=dtype)
        map = IndexMap(shape, (0,), tuple((0, 1) if a == axis else (-1, 0) for a in range(len(shape))))
        parts.append(wrap(make(View, shape, line.dtype, line.node, map)))
    return stack(parts).rechunk(chunks if chunks != "auto" else None)


def asarray(a: Any, dtype: Any = None, *, chunks: Any = None, copy: bool | None = None) -> Any:
    """Return an array over ``a`` without copying it: NumPy arrays are read where they lie, when they are computed.

    ``a`` may be an array of this library (returned itself, unless dtype or chunks differ), a NumPy array, a list, or anything with
    ``shape``, ``dtype`` and slicing. Of an array of `shmarray.shared` it is a stored array over the same memory, where writes go.
    Raises TypeError for what is no array of numbers.
    """
    if copy:
        return array(a, dtype=dtype, chunks=chunks)
    if isinstance(a, Handle):
        x: Any = a
    elif isinstance(a, SharedArray) and lease_of(a) is not None:
        x = stored(a, chunks)
    elif not isinstance(a, (np.ndarray, np.generic)) and _is_source(a):
        x = from_array(a, "auto" if chunks is None else chunks)
    else:
        x = as_handle(a)
    if dtype is not None:
        x = cast(x, dtype)
    return x if chunks is None else x.rechunk(chunks)


asanyarray = ascontiguousarray = asarray


def array(a: Any, dtype: Any = None, *, copy: bool = True, chunks: Any = None, ndmin: int = 0) -> Any:
    """Return a stored copy of ``a``, computed now (``copy=False``: as `asarray`).

    >>> import numpy as np, shmarray as sa
    >>> x = sa.array(np.arange(3))
    >>> x += 1
    >>> x.compute()
    array([1, 2, 3])
    """
    if not copy:
        x = asarray(a, dtype, chunks=chunks)
    elif isinstance(a, Handle) or (_is_source(a) and not isinstance(a, np.ndarray)):
        x = asarray(a, dtype, chunks=chunks).copy()
    else:
        refuse_masked(a, "the source")
        if dtype is not None:
            checked_dtype(dtype)
        values = np.asarray(a, dtype=dtype)
        checked_dtype(values.dtype, f"{type(a).__name__} {a!r}"[:80])
        if is_linking():  # in a step that is traced: made anew in each, and then written
            x = asarray(values.copy(), chunks=chunks)
        else:
            x = new_stored(values, normalize_chunks("auto" if chunks is None else chunks, values.shape, values.dtype))
    while x.ndim < ndmin:
        x = x[None]
    return x


def _is_source(x: Any) -> bool:
    return all(hasattr(x, name) for name in ("shape", "dtype", "__getitem__")) and not isinstance(x, np.generic)


def from_array(x: Any, chunks: Any = "auto", name: Any = None, lock: Any = None, asarray: Any = None, **ignored: Any) -> Any:
    """Return an array over anything with ``shape``, ``dtype`` and slicing: NumPy arrays, ``np.memmap``, h5py and zarr arrays.

    Nothing is copied: memory is read where it lies, other sources chunk by chunk by this process, each time they are computed
    (``persist()`` once for repeated use). Other arguments of dask's function are accepted and have no effect.
    """
    if isinstance(x, Handle):
        return as_handle(x).rechunk(chunks)
    if isinstance(x, (np.ndarray, np.generic)) or not _is_source(x):
        refuse_masked(x, "the source")
        values = np.asarray(x)
        checked_dtype(values.dtype, f"{type(x).__name__}")
        node: Expr = in_memory(values)
    else:
        shape = _shape(x.shape)
        node = make(Foreign, shape, checked_dtype(x.dtype, type(x).__name__), x, (0,) * len(shape))
    own = getattr(x, "chunks", None)
    if (
        chunks == "auto"
        and isinstance(own, tuple)
        and len(own) == node.ndim
        and node.ndim
        and all(isinstance(c, int) and c > 0 for c in own)
    ):
        chunks = own
    return wrap(node, normalize_chunks(chunks, node.shape, node.dtype))
