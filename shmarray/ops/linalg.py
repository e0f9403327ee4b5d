"""Products of matrices: panels of rows and columns, one BLAS call per tile, each worker with one BLAS thread.

Promises: tiles depend on the shapes alone, so bits do not depend on workers or chunks.
Never put here: decompositions; NumPy does those on the whole (`fallback` in ``array``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from shmarray.dtypes import result_dtypes
from shmarray.expr import Block, BlockOperation, make
from shmarray.handle import as_handle, wrap
from shmarray.ops.creation import zeros
from shmarray.ops.elementwise import apply
from shmarray.ops.reductions import any as _any
from shmarray.ops.reductions import sum as _sum
from shmarray.ops.shaping import moveaxis, reshape, transpose
from shmarray.region import Box, broadcast_shape

__all__ = ["dot", "inner", "matmul", "matvec", "outer", "tensordot", "vdot", "vecdot", "vecmat"]

EDGE_ITEMS = 512  # rows and columns of a tile: large enough for BLAS, small enough for many tasks
DEPTH_ITEMS = 1 << 10  # of the summed axis at once
SPLIT_ITEMS = 1 << 16  # of the summed axis, where the result is small and that axis long
FEW_TILES = 8


class _OneBlasThread:
    """While tiles are multiplied in this process, BLAS keeps to one thread: with another count it gives other bits.

    Workers have one anyway. Several threads may be inside: the first one in sets the limit, the last one out takes it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the three below
        self._inside = 0
        self._controller: Any = None
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                if self._controller is None:
                    from threadpoolctl import ThreadpoolController  # looks at every loaded library: only for whoever multiplies

                    self._controller = ThreadpoolController().select(user_api="blas")
                self._release_control()
                self._limit = self._controller.limit(limits=1)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._release_control()
                self._limit.restore_original_limits()
                self._release_control()

    def _release_control(self) -> None:
        """Let another thread than the last one set the limit: newer threadpoolctl ignores it otherwise, and here it is counted."""
        for library in self._controller.lib_controllers:
            release = getattr(library, "clear_controlling_thread", None)
            if release is not None:
                release(force=True)


_one_blas_thread = _OneBlasThread()


class _MatMul(BlockOperation):
    """Tiles of ``a @ b``: a panel of rows by a panel of columns."""

    name = "matmul"
    memory_inputs = True

    def __init__(self, a: tuple[int, ...], b: tuple[int, ...], itemsize: int) -> None:
        self.a, self.b, self.itemsize = a, b, itemsize
        self.batch = broadcast_shape(a[:-2], b[:-2])

    def grid(self) -> tuple[tuple[int, ...], ...]:
        rows, columns = self.a[-2], self.b[-1]
        lead = tuple((1,) * n for n in self.batch)
        return (*lead, _cut(rows, EDGE_ITEMS), _cut(columns, EDGE_ITEMS))

    def needs(self, at: Box) -> tuple[Box, ...]:
        whole = slice(0, self.a[-1])
        return (*_batch(at, self.a), at[-2], whole), (*_batch(at, self.b), whole, at[-1])

    def rounds(self, at: Box) -> Iterator[tuple[Box, ...]]:
        """Yield pieces of the two panels: a product of large matrices needs memory for a piece, not for all of the summed axis."""
        for low in range(0, self.a[-1], DEPTH_ITEMS):
            piece = slice(low, min(low + DEPTH_ITEMS, self.a[-1]))
            yield (*_batch(at, self.a), at[-2], piece), (*_batch(at, self.b), piece, at[-1])

    def add(self, out: np.ndarray[Any, Any], inputs: tuple[np.ndarray[Any, Any], ...], at: Box, k: int) -> None:
        more = np.empty(out.shape, out.dtype)
        self.run(more, inputs, at)
        np.add(out, more, out=out)  # of bool it is the logical or, as matmul's

    def run(self, out: np.ndarray[Any, Any], inputs: tuple[np.ndarray[Any, Any], ...], at: Box) -> None:
        a, b = inputs
        dtype = out.dtype
        # Contiguous: bits shall not tell how operands lie in memory. BLAS has a kernel per layout; z @ z.T of one memory is another one.
        with _one_blas_thread:
            np.matmul(np.ascontiguousarray(a, dtype), np.ascontiguousarray(b, dtype), out=out)

    def scratch(self, at: Box) -> int:
        rows, columns = at[-2].stop - at[-2].start, at[-1].stop - at[-1].start
        return int((2 * (rows + columns) * min(self.a[-1], DEPTH_ITEMS) + rows * columns) * self.itemsize)

    def cost(self, at: Box) -> int:
        rows, columns = at[-2].stop - at[-2].start, at[-1].stop - at[-1].start
        return max(1, int(rows * columns * self.a[-1]) // 8)


def _cut(n: int, edge: int) -> tuple[int, ...]:
    pieces = max(1, -(-n // edge))
    size = -(-n // pieces)
    return tuple(min(size, n - low) for low in range(0, n, size)) or (0,)


def _batch(at: Box, shape: tuple[int, ...]) -> Box:
    lead = at[len(at) - len(shape) : -2]
    return tuple(slice(0, 1) if n == 1 else piece for piece, n in zip(lead, shape[:-2], strict=True))


def matmul(x1: Any, x2: Any, /, out: Any = None, **kwargs: Any) -> Any:
    """Return the matrix product; 1-D operands and stacks of matrices as in NumPy.

    Inputs that are expressions are stored for the time being. A long summed axis of a small result is cut, so that all workers
    take part. Raises ValueError when the shapes do not match.

    >>> import shmarray as sa
    >>> (sa.ones((2, 3)) @ sa.ones((3, 2))).compute()
    array([[3., 3.],
           [3., 3.]])
    """
    a, b = as_handle(x1), as_handle(x2)
    if kwargs:  # dtype=, casting=, axes=: one call of NumPy
        return np.matmul(a, b, out=out, **kwargs)
    if not a.ndim or not b.ndim:
        which = 0 if not a.ndim else 1
        raise ValueError(
            f"matmul: Input operand {which} does not have enough dimensions (has 0, gufunc core with signature "
            f"(n?,k),(k,m?)->(n?,m?) requires 1)"
        )
    rows_gone, columns_gone = a.ndim == 1, b.ndim == 1
    a = a[None, :] if rows_gone else a
    b = b[:, None] if columns_gone else b
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"matmul: Input operand 1 has a mismatch in its core dimension 0, with gufunc signature (n?,k),(k,m?)->(n?,m?) "
            f"(size {b.shape[-2]} is different from {a.shape[-1]}); the shapes are {as_handle(x1).shape} and {as_handle(x2).shape}"
        )
    (dtype,) = result_dtypes(lambda p, q: np.matmul(p[None, :], q[:, None]), (a.dtype, b.dtype), {})
    result = _product(a, b, dtype)
    key: list[Any] = [slice(None)] * result.ndim
    if rows_gone:
        key[-2] = 0
    if columns_gone:
        key[-1] = 0
    result = result[tuple(key)] if rows_gone or columns_gone else result
    if out is not None:
        target = out[0] if isinstance(out, tuple) else out
        target[...] = result
        return target
    return result


def _product(a: Any, b: Any, dtype: np.dtype[Any]) -> Any:
    batch = broadcast_shape(a.shape[:-2], b.shape[:-2])
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    shape = (*batch, rows, columns)
    if math.prod(shape) == 0 or inner == 0:
        return zeros(shape, dtype)
    tiles = math.prod(batch) * -(-rows // EDGE_ITEMS) * -(-columns // EDGE_ITEMS)
    pieces = inner // SPLIT_ITEMS
    if tiles < FEW_TILES and pieces > 1 and not batch:
        cut = pieces * SPLIT_ITEMS
        left = moveaxis(reshape(a[:, :cut], (rows, pieces, SPLIT_ITEMS)), 1, 0)
        right = reshape(b[:cut], (pieces, SPLIT_ITEMS, columns))
        total = _sum(_block(left, right, dtype), axis=0, dtype=dtype)
        return total if cut == inner else total + _block(a[:, cut:], b[cut:], dtype)
    return _block(a, b, dtype)


def _block(a: Any, b: Any, dtype: np.dtype[Any]) -> Any:
    operation = _MatMul(a.shape, b.shape, dtype.itemsize)
    shape = (*operation.batch, a.shape[-2], b.shape[-1])
    return wrap(make(Block, shape, dtype, operation, (a.node, b.node), ("matmul", a.shape, b.shape)))


def dot(a: Any, b: Any, out: Any = None) -> Any:
    """Return the dot product: of two vectors a number, of matrices their product, else a sum over the last axis of ``a``."""
    x, y = as_handle(a), as_handle(b)
    if not x.ndim or not y.ndim:
        result = x * y
    elif y.ndim <= 2 and x.ndim <= 2:
        if x.shape[-1] != y.shape[0]:
            raise ValueError(f"shapes {x.shape} and {y.shape} not aligned: {x.shape[-1]} (dim {x.ndim - 1}) != {y.shape[0]} (dim 0)")
        result = matmul(x, y)
    else:
        result = tensordot(x, y, ([x.ndim - 1], [max(0, y.ndim - 2)]))
    if out is not None:
        out[...] = result
        return out
    return result


def vdot(a: Any, b: Any) -> Any:
    """Return the dot product of two flattened arrays, the first one conjugated."""
    x, y = reshape(as_handle(a), -1), reshape(as_handle(b), -1)
    return dot(_conjugate(x), y)


def inner(a: Any, b: Any) -> Any:
    """Return the sum of products over the last axes."""
    x, y = as_handle(a), as_handle(b)
    return x * y if not x.ndim or not y.ndim else tensordot(x, y, ([x.ndim - 1], [y.ndim - 1]))


def outer(a: Any, b: Any, out: Any = None) -> Any:
    """Return all products of an element of ``a`` and one of ``b``, both flattened."""
    x, y = reshape(as_handle(a), -1), reshape(as_handle(b), -1)
    result = x[:, None] * y[None, :]
    if out is not None:
        out[...] = result
        return out
    return result


def tensordot(a: Any, b: Any, axes: Any = 2) -> Any:
    """Return the sum of products over pairs of axes: a matrix product of the two, with those axes together."""
    x, y = as_handle(a), as_handle(b)
    if isinstance(axes, (int, np.integer)):
        ours, theirs = list(range(x.ndim - int(axes), x.ndim)), list(range(int(axes)))
    else:
        ours, theirs = ([axes[0]] if np.ndim(axes[0]) == 0 else list(axes[0])), ([axes[1]] if np.ndim(axes[1]) == 0 else list(axes[1]))
    ours, theirs = [k % x.ndim for k in ours], [k % y.ndim for k in theirs]
    if [x.shape[k] for k in ours] != [y.shape[k] for k in theirs]:
        raise ValueError(f"shape-mismatch for sum: {x.shape} over axes {ours}, {y.shape} over axes {theirs}")
    left = [k for k in range(x.ndim) if k not in ours]
    right = [k for k in range(y.ndim) if k not in theirs]
    n = math.prod(x.shape[k] for k in ours)
    rows = reshape(transpose(x, left + ours), (math.prod(x.shape[k] for k in left), n))
    columns = reshape(transpose(y, theirs + right), (n, math.prod(y.shape[k] for k in right)))
    return reshape(matmul(rows, columns), tuple(x.shape[k] for k in left) + tuple(y.shape[k] for k in right))


def vecdot(x1: Any, x2: Any, /, *, axis: int = -1) -> Any:
    """Return the dot products of the vectors along ``axis``, those of ``x1`` conjugated."""
    x, y = as_handle(x1), as_handle(x2)
    _check_core("vecdot", x, y, 1, 1)
    x, y = moveaxis(x, axis, -1), moveaxis(y, axis, -1)
    _check_equal("vecdot", x.shape[-1], y.shape[-1], x, y)
    dtype = np.result_type(x.dtype, y.dtype)
    if dtype.kind == "b":
        return _any(x & y, axis=-1)
    return _sum(_conjugate(x) * y, axis=-1, dtype=dtype)


def matvec(x1: Any, x2: Any, /) -> Any:
    """Return the products of matrices ``x1`` (last two axes) and vectors ``x2`` (last axis)."""
    x, y = as_handle(x1), as_handle(x2)
    _check_core("matvec", x, y, 2, 1)
    _check_equal("matvec", x.shape[-1], y.shape[-1], x, y)
    if x.ndim == 2 and y.ndim > 1:
        return matmul(y, transpose(x))
    return matmul(x, y) if y.ndim == 1 else matmul(x, y[..., None])[..., 0]


def vecmat(x1: Any, x2: Any, /) -> Any:
    """Return the products of vectors ``x1`` (last axis), conjugated, and matrices ``x2`` (last two axes)."""
    x, y = as_handle(x1), as_handle(x2)
    _check_core("vecmat", x, y, 1, 2)
    _check_equal("vecmat", x.shape[-1], y.shape[-2], x, y)
    x = _conjugate(x)
    return matmul(x, y) if x.ndim == 1 or y.ndim == 2 else matmul(x[..., None, :], y)[..., 0, :]


def _conjugate(x: Any) -> Any:
    return apply("conjugate", x) if x.dtype.kind == "c" else x


def _check_core(name: str, x: Any, y: Any, first: int, second: int) -> None:
    if x.ndim < first or y.ndim < second:
        raise ValueError(f"{name}: operands of shapes {x.shape} and {y.shape} need at least {first} and {second} dimensions")


def _check_equal(name: str, ours: int, theirs: int, x: Any, y: Any) -> None:
    if ours != theirs:
        raise ValueError(f"{name}: mismatch in the summed axis of shapes {x.shape} and {y.shape}: {ours} is different from {theirs}")
