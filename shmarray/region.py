"""Boxes in index space, and the affine maps between index spaces that slices, transposes and broadcasts are.

Promises: an `IndexMap` composes, applies to shapes and to strides, and says for a box of its output which strided box of its
input that is. Plain values, no memory.
Never put here: chunks, expressions, anything that moves bytes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "Box",
    "IndexMap",
    "axis_tuple",
    "broadcast_shape",
    "c_strides",
    "full_box",
    "identity_map",
    "index_map",
    "reshape_strides",
    "resolve_shape",
]

Box = tuple[slice, ...]  # per axis slice(start, stop), steps None


def full_box(shape: Sequence[int]) -> Box:
    """Return the box that is all of ``shape``."""
    return tuple(slice(0, n) for n in shape)


def is_broadcast(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether elements of an array share memory: an axis of several has stride 0."""
    return any(n > 1 and stride == 0 for n, stride in zip(shape, strides, strict=True))


def c_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the strides, in bytes, of a C-ordered array."""
    strides = []
    step = itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def broadcast_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the broadcast shape. Raises ValueError naming the shapes, as NumPy does."""
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        text = " ".join(str(s).replace(" ", "") for s in shapes)
        raise ValueError(f"operands could not be broadcast together with shapes {text}") from None


def axis_tuple(axis: Any, ndim: int) -> tuple[int, ...]:
    """Return the axes as a sorted tuple of non-negative ints; None means all. Raises AxisError or ValueError (repeated)."""
    if axis is None:
        return tuple(range(ndim))
    return tuple(sorted(np.lib.array_utils.normalize_axis_tuple(axis, ndim)))


def resolve_shape(shape: Any, size: int, old: tuple[int, ...]) -> tuple[int, ...]:
    """Return the new shape of a reshape, with -1 filled in. Raises ValueError as NumPy does."""
    new = tuple(operator.index(n) for n in (shape if isinstance(shape, (tuple, list, np.ndarray)) else (shape,)))
    unknown = [i for i, n in enumerate(new) if n < 0]
    if len(unknown) > 1:
        raise ValueError("can only specify one unknown dimension")
    if unknown:
        known = math.prod(n for n in new if n >= 0)
        if known and size % known == 0:
            new = tuple(size // known if n < 0 else n for n in new)
    if math.prod(new) != size or any(n < 0 for n in new):
        raise ValueError(f"cannot reshape array of size {size} and shape {old} into shape {new}")
    return new


def reshape_strides(shape: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the strides of the same bytes seen under ``new``, or None when only a copy can have that shape.

    Runs of axes that continue each other in memory can be cut differently; others cannot (as in NumPy's reshape).
    """
    if 0 in new:
        return c_strides(new, 1)
    runs: list[tuple[int, int]] = []  # (elements, innermost stride) of each run of axes that continue each other
    for n, s in zip(shape, strides, strict=True):
        if n == 1:
            continue
        if runs and runs[-1][1] == s * n:
            runs[-1] = (runs[-1][0] * n, s)
        else:
            runs.append((n, s))
    result: list[int] = []
    left, stride = 1, 0
    for n in reversed(new):
        if n == 1:
            result.append(stride or (strides[-1] if strides else 1))
            continue
        if left == 1:
            if not runs:
                return None
            left, stride = runs.pop()
        if left % n:
            return None
        result.append(stride)
        left //= n
        stride *= n
    return tuple(reversed(result)) if left == 1 and not runs else None


@dataclass(frozen=True, slots=True)
class IndexMap:
    """Where each element of the output lies in the input.

    Output index ``j`` reads input index ``i`` with ``i[a] = offsets[a] + sum(step * j[k] for k where axes[k] == (a, step))``.
    An output axis that moves nothing in the input (a new or broadcast axis) has input axis -1. An input axis serves at most one
    output axis.
    """

    shape: tuple[int, ...]  # of the output
    offsets: tuple[int, ...]  # per input axis
    axes: tuple[tuple[int, int], ...]  # per output axis: (input axis or -1, step)

    def after(self, inner: IndexMap) -> IndexMap:
        """Return the map that first applies ``inner`` to the input and then this."""
        offsets = list(inner.offsets)
        for middle, offset in enumerate(self.offsets):
            axis, step = inner.axes[middle]
            if axis >= 0:
                offsets[axis] += step * offset
        axes = []
        for middle, step in self.axes:
            axis, inner_step = inner.axes[middle] if middle >= 0 else (-1, 0)
            axes.append((axis, step * inner_step) if axis >= 0 else (-1, 0))
        return IndexMap(self.shape, tuple(offsets), tuple(axes))

    def is_identity(self, shape: tuple[int, ...]) -> bool:
        """Return whether the output is the whole input, axis by axis."""
        return (
            self.shape == shape
            and not any(self.offsets)
            and all((a == k and s == 1) or self.shape[k] == 1 for k, (a, s) in enumerate(self.axes))
        )

    def permuted(self, order: tuple[int, ...]) -> IndexMap:
        """Return the map with its output axes in another order."""
        return IndexMap(tuple(self.shape[k] for k in order), self.offsets, tuple(self.axes[k] for k in order))

    def apply_strides(self, strides: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the byte offset and strides of the output over an input with ``strides``."""
        if 0 in self.shape:
            return 0, c_strides(self.shape, 1)  # no element: an offset could lie outside the input
        offset = sum(o * s for o, s in zip(self.offsets, strides, strict=True))
        return offset, tuple(strides[a] * s if a >= 0 else 0 for a, s in self.axes)

    def bounds(self) -> tuple[list[int], list[int]]:
        """Return the smallest box of the input, as (starts, stops), that holds every element the output has; there is one."""
        low, high = list(self.offsets), list(self.offsets)
        for n, (axis, step) in zip(self.shape, self.axes, strict=True):
            if axis >= 0:
                low[axis] = min(low[axis], low[axis] + step * (n - 1))
                high[axis] = max(high[axis], high[axis] + step * (n - 1))
        return low, [n + 1 for n in high]

    def for_operand(self, operand: tuple[int, ...], shape: tuple[int, ...]) -> IndexMap:
        """Return this map, made for ``shape``, for an operand that broadcasts to it; broadcast axes come out of length 1."""
        lead = len(shape) - len(operand)
        offsets = [0] * len(operand)
        axes = []
        out = []
        for axis, n in enumerate(operand):
            if n != 1 or shape[axis + lead] == 1:
                offsets[axis] = self.offsets[axis + lead]
        for k, (axis, step) in enumerate(self.axes):
            mine = axis - lead
            if axis < 0 or mine < 0 or (operand[mine] == 1 and shape[axis] != 1):
                axes.append((-1, 0))
                out.append(1)
            else:
                axes.append((mine, step))
                out.append(self.shape[k])
        return IndexMap(tuple(out), tuple(offsets), tuple(axes))


def identity_map(shape: tuple[int, ...]) -> IndexMap:
    """Return the map that changes nothing."""
    return IndexMap(shape, (0,) * len(shape), tuple((k, 1) for k in range(len(shape))))


def index_map(key: Any, shape: tuple[int, ...]) -> IndexMap:
    """Return the map of a basic index: ints, slices, None and ``...``.

    Raises IndexError, worded as NumPy words it, for too many indices, an int out of bounds, and anything else as an index.
    """
    parts = list(key) if isinstance(key, tuple) else [key]
    used = sum(1 for p in parts if p is not None and p is not Ellipsis)
    if used > len(shape):
        raise IndexError(f"too many indices for array: array is {len(shape)}-dimensional, but {used} were indexed")
    dots = [i for i, p in enumerate(parts) if p is Ellipsis]
    if len(dots) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    fill = [slice(None)] * (len(shape) - used)
    if dots:
        parts[dots[0] : dots[0] + 1] = fill
    else:
        parts.extend(fill)
    offsets: list[int] = []
    axes: list[tuple[int, int]] = []
    out: list[int] = []
    axis = 0
    for part in parts:
        if part is None:
            axes.append((-1, 0))
            out.append(1)
            continue
        n = shape[axis]
        if isinstance(part, slice):
            start, stop, step = part.indices(n)
            count = len(range(start, stop, step))
            offsets.append(start if count else 0)
            axes.append((axis, step if count > 1 else 1))
            out.append(count)
        else:
            try:
                i = operator.index(part)
            except TypeError:
                raise IndexError(
                    f"only integers, slices (`:`), ellipsis (`...`), numpy.newaxis (`None`) and integer or boolean arrays are valid "
                    f"indices, got {type(part).__name__}: {part!r}"
                ) from None
            if not -n <= i < n:
                raise IndexError(f"index {i} is out of bounds for axis {axis} with size {n}")
            offsets.append(i + n if i < 0 else i)
        axis += 1
    return IndexMap(tuple(out), tuple(offsets), tuple(axes))
