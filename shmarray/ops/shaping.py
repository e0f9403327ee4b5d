"""Indexing and moving axes: views where NumPy gives views, pieces written in place where arrays are put together.

Promises: of stored arrays, basic indices, transposes and reshapes that NumPy makes without a copy are views that share bytes.
Never put here: kernels; anything that computes.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from shmarray.chunks import Chunks
from shmarray.dtypes import cast_dtype
from shmarray.expr import Assemble, Expr, Reshape, View, make, user_line
from shmarray.handle import Handle, Link, as_handle, is_linking, note_values, value_of, wrap, wrap_linked, wrap_stored
from shmarray.ops.elementwise import cast
from shmarray.ops.gather import gather, is_traced, pick, spilling_pool, tracing_pool
from shmarray.region import IndexMap, axis_tuple, broadcast_shape, identity_map, index_map, reshape_strides, resolve_shape
from shmarray.storage import Layout

NDArray = np.ndarray[Any, Any]

__all__ = [
    "atleast_1d",
    "atleast_2d",
    "block",
    "broadcast_arrays",
    "broadcast_to",
    "concatenate",
    "expand_dims",
    "flip",
    "fliplr",
    "flipud",
    "getitem",
    "hstack",
    "moveaxis",
    "ravel",
    "reshape",
    "roll",
    "rollaxis",
    "setitem_node",
    "squeeze",
    "stack",
    "swapaxes",
    "take",
    "transpose",
    "view_of",
    "vstack",
]


def view_of(x: Any, map: IndexMap, chunks: Chunks | None = None) -> Any:
    """Return the view ``map`` of ``x``: of the same bytes when it is stored."""
    if chunks is None:
        chunks = _map_chunks(x, map)
    if x._storage is not None:
        offset, strides = map.apply_strides(x._layout.strides)
        layout = Layout(x._layout.offset + offset, map.shape, strides, x.dtype)
        return wrap_stored(x._storage, layout, chunks, live=x._live)

    def seen(node: Expr) -> Expr:
        return node if map.is_identity(node.shape) else make(View, map.shape, node.dtype, node, map)

    def written(node: Expr, values: Expr) -> Expr:
        if any(n > 1 and axis < 0 for n, (axis, _) in zip(map.shape, map.axes, strict=True)):
            raise ValueError(f"assignment destination is read-only: shape {map.shape} is a broadcast, whose elements share memory")
        return make(Assemble, node.shape, node.dtype, (node, values), (identity_map(node.shape), map), "setitem")

    return wrap_linked(Link(x, seen, written), chunks) if is_linking() else wrap(seen(x.node), chunks)


def _map_chunks(x: Any, map: IndexMap) -> Chunks:
    """Return the chunks of a view: those of the input that it cuts through."""
    result: list[tuple[int, ...]] = []
    for n, (axis, step) in zip(map.shape, map.axes, strict=True):
        if axis < 0 or n == 0 or len(x.chunks[axis]) == 1:
            result.append((n,))
            continue
        sizes = x.chunks[axis]
        if n == x.shape[axis] and step == 1:
            result.append(sizes)
            continue
        first = map.offsets[axis]
        last = first + (n - 1) * step
        edges = np.cumsum((0, *sizes))
        # How many of the picked indices lie before each edge, seen in the order they are picked.
        lowest = first if step > 0 else last
        before = np.clip(-(-(edges - lowest) // abs(step)), 0, n)
        counts = np.diff(before)
        if step < 0:
            counts = counts[::-1]
        result.append(tuple(int(c) for c in counts if c) or (n,))
    return tuple(result)


def getitem(x: Any, key: Any) -> Any:
    """Return ``x[key]``: a view for basic indices; a new array for a mask or integer arrays."""
    parts = key if isinstance(key, tuple) else (key,)
    if any(
        isinstance(p, (list, np.ndarray, Handle)) and not (isinstance(p, np.ndarray) and p.ndim == 0 and p.dtype.kind in "iu")
        for p in parts
    ):
        return _fancy(x, key)
    if any(isinstance(p, (bool, np.bool_)) for p in parts):
        return _fancy(x, key)
    view = view_of(x, index_map(key, x.shape))
    return value_of(view) if any(isinstance(p, np.ndarray) for p in parts) else view  # an index without axes: not a view, in NumPy


def _fancy(x: Any, key: Any) -> Any:
    """One call of NumPy on the whole: how many elements a mask picks must be counted anyway.

    Of what is spilled, or traced, rows along one axis, block by block; in a step integer arrays of any kind.
    """
    found = _picked(x, key)
    if found is not None:
        return found
    rows = _rows_of(x, key) if tracing_pool(x) is not None or spilling_pool(x) is not None else None
    if rows is not None:
        return _gathered(*rows)
    parts = tuple(np.asarray(p) if isinstance(p, Handle) else p for p in (key if isinstance(key, tuple) else (key,)))
    return as_handle(np.asarray(x)[parts if isinstance(key, tuple) else parts[0]])


def _picked(x: Any, key: Any) -> Any:
    """Return ``x[key]`` of a step that is traced: slices and arrays of integers, with values or without; None: it is another key.

    Arrays that stand side by side are replaced by their axes there, others by axes in front, as in NumPy; a number among them is one.
    """
    parts = [np.asarray(p) if isinstance(p, list) else p for p in (key if isinstance(key, tuple) else (key,))]
    at = [k for k, p in enumerate(parts) if isinstance(p, (Handle, np.ndarray))]
    has_several = len(at) > 1 or any(isinstance(p, (int, np.integer)) for p in parts)
    if not any(is_traced(parts[k]) for k in at) and not (is_traced(x) and has_several):
        return None
    if any(isinstance(p, (bool, np.bool_)) for p in parts) or any(parts[k].dtype.kind == "b" for k in at):
        return None  # how many a mask picks is not known
    for k in at:
        if parts[k].dtype.kind not in "iu":
            raise IndexError(f"arrays used as indices must be of integer (or boolean) type, this one is of {parts[k].dtype}: i.astype(int)")
    numbers = [k for k, p in enumerate(parts) if k in at or isinstance(p, (int, np.integer))]
    around = tuple(slice(None) if k in at else p for k, p in enumerate(parts))
    view = view_of(x, index_map(around, x.shape))
    named = dict(zip([k for k, p in enumerate(parts) if p is not None and p is not Ellipsis], itertools.count()))
    dots = [k for k, p in enumerate(parts) if p is Ellipsis]
    after = x.ndim - len(named)  # axes that the ellipsis stands for
    names = tuple(named[k] + (after if dots and k > dots[0] else 0) for k in at)
    left = [k for k in range(len(parts)) if k in at or k not in numbers]  # what gives the view axes
    axes = [left.index(k) + (after - 1 if dots and k > dots[0] else 0) for k in at]
    if numbers != list(range(numbers[0], numbers[-1] + 1)):
        view, axes = moveaxis(view, axes, range(len(axes))), list(range(len(axes)))
    return _picked_at(view, [parts[k] for k in at], axes[0], names)


def _picked_at(x: Any, given: Sequence[Any], axis: int, names: tuple[int, ...]) -> Any:
    """Return ``x`` with its axes from ``axis`` on replaced by the axes that arrays of integers have together."""
    indices = [as_handle(p) for p in given]
    common = broadcast_shape(*(p.shape for p in indices))
    for index, n, name in zip(given, x.shape[axis:], names, strict=False):
        if math.prod(common) and not n:
            raise IndexError(f"an index array cannot pick from axis {name}, which has no elements")
        if isinstance(index, np.ndarray):
            np.broadcast_to(np.uint8(0), (n,))[index]  # raises what NumPy raises
    shape = (*x.shape[:axis], *common, *x.shape[axis + len(indices) :])
    if not math.prod(shape):
        return as_handle(np.empty(shape, x.dtype))
    found = pick(x, [broadcast_to(index, common or (1,)) for index in indices], axis, names)
    return found if common else getitem(found, (*(slice(None),) * axis, 0))


def _rows_of(x: Any, key: Any) -> tuple[Any, NDArray, int] | None:
    """Return (array, index, axis) of a key of slices and one array of integers, or one mask of one axis; None: it is another."""
    parts = [np.asarray(p) if isinstance(p, (Handle, list)) else p for p in (key if isinstance(key, tuple) else (key,))]
    at = [k for k, p in enumerate(parts) if isinstance(p, np.ndarray)]
    if len(at) != 1 or any(not isinstance(p, slice) and p is not Ellipsis for k, p in enumerate(parts) if k != at[0]):
        return None
    index = parts[at[0]]
    if index.ndim == 0 or index.dtype.kind not in "iub" or (index.dtype.kind == "b" and index.ndim > 1):
        return None
    dots = [k for k, p in enumerate(parts) if p is Ellipsis]
    if len(dots) > 1 or len(parts) - len(dots) > x.ndim:
        return None  # NumPy says what is wrong
    axis = at[0] if not dots or dots[0] > at[0] else at[0] + x.ndim - len(parts)
    around = tuple(slice(None) if k == at[0] else p for k, p in enumerate(parts))
    return view_of(x, index_map(around, x.shape)), index, axis


def _gathered(x: Any, index: NDArray, axis: int) -> Any:
    """Return ``x[..., index, ...]``, made block by block: of what is spilled a stored array, computed now; within a step an expression."""
    note_values(index)
    like = np.broadcast_to(np.uint8(0), tuple(n if k == axis else 1 for k, n in enumerate(x.shape)))
    key: Any = (*(slice(None),) * axis, index)
    picked = like[key]  # raises what NumPy raises
    if index.dtype.kind == "b":
        flat = np.flatnonzero(index)
    else:
        flat = index.astype(np.int64).reshape(-1)
        flat[flat < 0] += x.shape[axis]
    shape = (*x.shape[:axis], *picked.shape[axis : axis + index.ndim], *x.shape[axis + 1 :])
    tracing = tracing_pool(x)
    pool = tracing or spilling_pool(x)
    if not math.prod(shape) or pool is None:
        return as_handle(np.empty(shape, x.dtype))
    pieces = gather(x, flat, axis, pool)
    rows = pieces[0] if len(pieces) == 1 else concatenate(pieces, axis)
    return reshape(rows if tracing is not None else rows.persist(), shape)


def setitem_node(base: Expr, key: Any, value: Any) -> Expr:
    """Return ``base`` with ``value`` at ``key``: the node that ``x[key] = value`` puts into the handle of an expression."""
    map = index_map(key, base.shape)
    piece = cast(as_handle(value), base.dtype)
    _check_fits(piece.shape, map.shape)
    while piece.ndim > len(map.shape):
        piece = piece[0]
    return make(Assemble, base.shape, base.dtype, (base, piece.node), (identity_map(base.shape), map), "setitem")


def _check_fits(shape: tuple[int, ...], into: tuple[int, ...]) -> None:
    lead = len(shape) - len(into)
    trimmed = shape[lead:] if lead > 0 and all(n == 1 for n in shape[:lead]) else shape
    try:
        fits = np.broadcast_shapes(trimmed, into) == into
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"could not broadcast input array from shape {shape} into shape {into}")


def transpose(a: Any, axes: Any = None) -> Any:
    """Return ``a`` with its axes reversed, or in the order of ``axes``. No bytes move."""
    x = as_handle(a)
    order = tuple(reversed(range(x.ndim))) if axes is None else tuple(np.lib.array_utils.normalize_axis_tuple(axes, x.ndim))
    if len(order) != x.ndim:
        raise ValueError("axes don't match array")
    map = IndexMap(tuple(x.shape[k] for k in order), (0,) * x.ndim, tuple((k, 1) for k in order))
    return view_of(x, map)


def swapaxes(a: Any, axis1: int, axis2: int) -> Any:
    """Return ``a`` with two axes exchanged."""
    x = as_handle(a)
    (one,), (two,) = axis_tuple(axis1, x.ndim), axis_tuple(axis2, x.ndim)
    order = list(range(x.ndim))
    order[one], order[two] = order[two], order[one]
    return transpose(x, order)


def moveaxis(a: Any, source: Any, destination: Any) -> Any:
    """Return ``a`` with axes moved to new positions, the others in their order."""
    x = as_handle(a)
    return transpose(x, _moved(x.ndim, source, destination))


def _moved(ndim: int, source: Any, destination: Any) -> list[int]:
    normalize = np.lib.array_utils.normalize_axis_tuple
    sources, places = normalize(source, ndim, "source"), normalize(destination, ndim, "destination")
    order = [k for k in range(ndim) if k not in sources]
    if len(sources) != len(places):
        raise ValueError("`source` and `destination` arguments must have the same number of elements")
    for place, axis in sorted(zip(places, sources, strict=True)):
        order.insert(place, axis)
    return order


def rollaxis(a: Any, axis: int, start: int = 0) -> Any:
    """Return ``a`` with ``axis`` moved before position ``start``."""
    x = as_handle(a)
    (only,) = axis_tuple(axis, x.ndim)
    place = start - 1 if only < start else start
    return moveaxis(x, only, place)


def squeeze(a: Any, axis: Any = None) -> Any:
    """Return ``a`` without axes of length 1 (or without ``axis``, which must have length 1)."""
    x = as_handle(a)
    gone = [k for k, n in enumerate(x.shape) if n == 1] if axis is None else axis_tuple(axis, x.ndim)
    if any(x.shape[k] != 1 for k in gone):
        raise ValueError("cannot select an axis to squeeze out which has size not equal to one")
    return getitem(x, tuple(0 if k in gone else slice(None) for k in range(x.ndim)))


def expand_dims(a: Any, axis: Any) -> Any:
    """Return ``a`` with new axes of length 1 at positions ``axis`` of the result."""
    x = as_handle(a)
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    new = axis_tuple(axes, x.ndim + len(axes))
    return getitem(x, tuple(None if k in new else slice(None) for k in range(x.ndim + len(axes))))


def atleast_1d(a: Any) -> Any:
    """Return ``a`` with at least one axis."""
    x = as_handle(a)
    return x if x.ndim else x[None]


def atleast_2d(a: Any) -> Any:
    """Return ``a`` with at least two axes, new ones first."""
    x = atleast_1d(a)
    return x if x.ndim > 1 else x[None]


def broadcast_to(a: Any, shape: Any, *, chunks: Any = None) -> Any:
    """Return ``a`` broadcast to ``shape``. No bytes move. Raises ValueError naming both shapes."""
    x = as_handle(a)
    new = (operator.index(shape),) if isinstance(shape, (int, np.integer)) else tuple(operator.index(n) for n in shape)
    lead = len(new) - x.ndim
    if lead < 0 or any(n not in (1, m) for n, m in zip(x.shape, new[lead:], strict=True)):
        raise ValueError(
            f"operands could not be broadcast together with remapped shapes [original->remapped]: {x.shape} and requested shape {new}"
        )
    axes = tuple((k - lead, 1) if k >= lead and x.shape[k - lead] == n else (-1, 0) for k, n in enumerate(new))
    result = view_of(x, IndexMap(new, (0,) * x.ndim, axes))
    return result if chunks is None else result.rechunk(chunks)


def broadcast_arrays(*args: Any) -> tuple[Any, ...]:
    """Return the arrays, each broadcast to their common shape."""
    arrays = [as_handle(a) for a in args]
    shape = broadcast_shape(*(a.shape for a in arrays))
    return tuple(broadcast_to(a, shape) for a in arrays)


def reshape(a: Any, shape: Any, order: str = "C") -> Any:
    """Return the elements of ``a`` in C order under another shape; a view of a stored array where NumPy makes one.

    Raises ValueError, as NumPy does, when the sizes differ.
    """
    x = as_handle(a)
    if order not in ("C", "A"):
        raise ValueError(f"reshape(order={order!r}) is not supported: elements are taken in C order; transpose first for 'F'")
    new = resolve_shape(shape, math.prod(x.shape), x.shape)
    if new == x.shape:
        return x
    if x._storage is not None:
        strides = reshape_strides(x.shape, x._layout.strides, new)
        if strides is not None:
            return wrap_stored(x._storage, Layout(x._layout.offset, new, strides, x.dtype), live=x._live)

    def seen(node: Expr) -> Expr:
        return make(Reshape, new, node.dtype, node)

    def written(node: Expr, values: Expr) -> Expr:
        if x._link is not None:
            raise TypeError(
                f"writing through a reshaped slice or transpose, of shape {new}, at {user_line()}: whether NumPy would make a view or a "
                f"copy of it depends on where it lies. Write through slices of the array itself, or into a copy()."
            )
        return make(Reshape, node.shape, node.dtype, values)

    return wrap_linked(Link(x, seen, written)) if is_linking() else wrap(seen(x.node))


def ravel(a: Any, order: str = "C") -> Any:
    """Return the elements in C order along one axis."""
    return reshape(a, -1, order)


def flip(m: Any, axis: Any = None) -> Any:
    """Return ``m`` in reverse along ``axis`` (None: all). No bytes move."""
    x = as_handle(m)
    axes = axis_tuple(axis, x.ndim)
    return getitem(x, tuple(slice(None, None, -1) if k in axes else slice(None) for k in range(x.ndim)))


def flipud(m: Any) -> Any:
    """Return ``m`` in reverse along the first axis."""
    return flip(m, 0)


def fliplr(m: Any) -> Any:
    """Return ``m`` in reverse along the second axis."""
    return flip(m, 1)


def _assemble(
    shape: tuple[int, ...], dtype: np.dtype[Any], parts: Sequence[tuple[Any, IndexMap]], name: str, chunks: Chunks | None = None
) -> Any:
    node = make(Assemble, shape, dtype, tuple(p.node for p, _ in parts), tuple(m for _, m in parts), name, True)
    return wrap(node, chunks)


def _place(shape: tuple[int, ...], start: Sequence[int]) -> IndexMap:
    return IndexMap(tuple(shape), tuple(start), tuple((k, 1) for k in range(len(shape))))


def concatenate(arrays: Any, axis: int | None = 0, out: Any = None, *, dtype: Any = None, casting: str = "same_kind") -> Any:
    """Return the arrays one after the other along ``axis``; each writes straight into its part.

    Raises ValueError for no arrays and for shapes that differ elsewhere.

    >>> import shmarray as sa
    >>> sa.concatenate([sa.zeros(2), sa.ones(1)]).compute()
    array([0., 0., 1.])
    """
    parts = [as_handle(a) for a in arrays]
    if not parts:
        raise ValueError("need at least one array to concatenate")
    if axis is None:
        parts, axis = [ravel(p) for p in parts], 0
    first = parts[0]
    if first.ndim == 0:
        raise ValueError("zero-dimensional arrays cannot be concatenated")
    (only,) = axis_tuple(axis, first.ndim)
    for k, part in enumerate(parts):
        if part.ndim != first.ndim:
            raise ValueError(
                f"all the input array dimensions except for the concatenation axis must match exactly, but array 0 has {first.ndim} "
                f"dimension(s) and array {k} has {part.ndim}"
            )
        for a in range(first.ndim):
            if a != only and part.shape[a] != first.shape[a]:
                raise ValueError(
                    f"all the input array dimensions except for the concatenation axis must match exactly, but along dimension {a}, "
                    f"array 0 has size {first.shape[a]} and array {k} has size {part.shape[a]}"
                )
    kind = np.result_type(*(p.dtype for p in parts))
    kind = kind if dtype is None else cast_dtype(kind, dtype)
    parts = [cast(p, kind, casting) for p in parts]
    edges = [0, *itertools.accumulate(p.shape[only] for p in parts)]
    shape = tuple(edges[-1] if a == only else n for a, n in enumerate(first.shape))
    maps = [_place(p.shape, [edges[k] if a == only else 0 for a in range(first.ndim)]) for k, p in enumerate(parts)]
    along = tuple(c for p in parts for c in p.chunks[only] if c) or (0,)
    chunks = tuple(along if a == only else c for a, c in enumerate(first.chunks))
    result = _assemble(shape, kind, list(zip(parts, maps, strict=True)), "concatenate", chunks)
    if out is not None:
        out[...] = result if isinstance(out, Handle) else result.compute()
        return out
    return result


def stack(arrays: Any, axis: int = 0, out: Any = None) -> Any:
    """Return the arrays along a new axis. Raises ValueError when their shapes differ."""
    parts = [as_handle(a) for a in arrays]
    if not parts:
        raise ValueError("need at least one array to stack")
    if len({p.shape for p in parts}) > 1:
        raise ValueError(f"all input arrays must have the same shape, got {', '.join(str(p.shape) for p in parts)}")
    (only,) = axis_tuple(axis, parts[0].ndim + 1)
    return concatenate([expand_dims(p, only) for p in parts], only, out)


def vstack(tup: Any) -> Any:
    """Return the arrays as rows, one below the other."""
    return concatenate([atleast_2d(a) for a in tup], 0)


def hstack(tup: Any) -> Any:
    """Return the arrays side by side."""
    parts = [atleast_1d(a) for a in tup]
    return concatenate(parts, 0 if parts and parts[0].ndim == 1 else 1)


def block(arrays: Any) -> Any:
    """Return the array put together from nested lists of blocks: innermost lists along the last axis."""

    def depth(x: Any) -> int:
        return 1 + max((depth(v) for v in x), default=0) if isinstance(x, list) else 0

    levels = depth(arrays)

    def join(x: Any, level: int) -> Any:
        if not isinstance(x, list):
            result = as_handle(x)
            while result.ndim < levels:
                result = result[None]
            return result
        return concatenate([join(v, level + 1) for v in x], level - levels)

    return join(arrays, 0)


def roll(a: Any, shift: Any, axis: Any = None) -> Any:
    """Return ``a`` with its elements shifted along ``axis`` (None: flat), those beyond the end coming in at the start."""
    x = as_handle(a)
    if axis is None:
        return reshape(roll(ravel(x), shift, 0), x.shape)
    axes = (axis,) if np.ndim(axis) == 0 else tuple(axis)
    shifts = (shift,) if np.ndim(shift) == 0 else tuple(shift)
    if len(shifts) == 1:
        shifts = shifts * len(axes)
    if len(axes) == 1:
        axes = axes * len(shifts)
    if len(axes) != len(shifts):
        raise ValueError("'shift' and 'axis' should be scalars or 1D sequences")
    total = [0] * x.ndim
    for s, k in zip(shifts, axes, strict=True):
        (only,) = axis_tuple(k, x.ndim)
        total[only] += operator.index(s)
    pieces: list[list[tuple[slice, int]]] = []
    for n, s in zip(x.shape, total, strict=True):
        s = s % n if n else 0
        pieces.append([(slice(0, n), 0)] if not s else [(slice(n - s, n), 0), (slice(0, n - s), s)])
    parts = []
    for combination in itertools.product(*pieces):
        part = getitem(x, tuple(c for c, _ in combination))
        parts.append((part, _place(part.shape, [at for _, at in combination])))
    return value_of(parts[0][0]) if len(parts) == 1 else _assemble(x.shape, x.dtype, parts, "roll", x.chunks)


def take(a: Any, indices: Any, axis: int | None = None) -> Any:
    """Return the elements at ``indices`` along ``axis`` (None: of the flattened array)."""
    x = as_handle(a)
    if axis is None:
        x, axis = ravel(x), 0
    (only,) = axis_tuple(axis, x.ndim)
    if isinstance(indices, (int, np.integer)):
        return value_of(getitem(x, (*(slice(None),) * only, int(indices))))
    if is_traced(indices):
        if indices.dtype.kind not in "iu":
            raise TypeError(f"take() by an array of {indices.dtype}: indices are integers")
        return _picked_at(x, [indices], only, (only,))
    index = np.asarray(indices)
    if index.ndim and index.dtype.kind in "iu" and (tracing_pool(x) is not None or spilling_pool(x) is not None):
        return _gathered(x, index, only)
    return as_handle(np.take(np.asarray(x), index, axis=only))
