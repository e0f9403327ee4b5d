"""Elements picked by integer arrays, of arrays in the spill file or without values yet: block by block, each reading what it picks.

Indices that are known say what a block reads (`gather`); those that are computed along with it, as in a step of a simulation, do not, and
each block looks at all of the array, where it lies (`pick`).

Promises: NumPy's values and errors; memory for blocks alone, whatever the array and the index.
Never put here: which indices mean what (``shaping``), arrays that lie in memory, where one call of NumPy is sooner done.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shmarray.expr import Block, BlockOperation, Expr, InMemory, Stored, View, make, postorder
from shmarray.handle import Handle, wrap
from shmarray.region import Box
from shmarray.tiles import map_grid, slab_sizes

if TYPE_CHECKING:
    from scheduler.run import Pool

__all__ = ["block_nbytes", "cut", "gather", "is_traced", "pick", "spilling_pool", "tracing_pool", "whole_reads"]

NDArray = np.ndarray[Any, Any]
SHARE = 6  # of what is free for each worker: a block, copies of it and of what it is made of, and temporaries of NumPy's
RESERVED_SHARE = 8  # of the limit: what plans need beside, which stored arrays leave free for them
FEWEST = 256  # blocks to a limit, whatever is free: the plan is refused where that is too much
MOST_NBYTES = 64 << 20
SPAN_NBYTES = 1 << 20  # of the input at once
INDEX_NBYTES = 64  # that NumPy's temporaries need for each index of a block
MOST_INDICES = 1 << 20  # in one plan: they travel to the workers with the kernel


def spilling_pool(x: Any) -> Pool | None:
    """Return the pool in whose spill file lies what ``x`` is computed from: as a whole it may have no place in memory. None: nowhere."""
    if x._storage is not None:
        return x._storage.pool if x._storage.is_spilled else None
    return next((n.storage.pool for n in postorder([x.node]) if isinstance(n, Stored) and n.storage.is_spilled), None)


def tracing_pool(x: Any) -> Pool | None:
    """Return the pool of a step of a simulation that is being traced, if ``x`` is made of its arrays, which have no values yet."""
    if x._storage is not None:
        return None
    return next((n.storage.pool for n in postorder([x.node]) if isinstance(n, Stored) and n.storage.is_role), None)


def is_traced(x: Any) -> bool:
    """Whether ``x`` is made of the arrays of a step of a simulation, which have no values yet."""
    return isinstance(x, Handle) and tracing_pool(x) is not None


def block_nbytes(pool: Pool, result_nbytes: int) -> int:
    """Return how large blocks may be where a result of so many bytes is to be stored as well: values do not depend on it."""
    limit, workers = pool.budget.limit_nbytes, max(1, pool.workers)
    reserved = limit // RESERVED_SHARE
    free = pool.free_nbytes()
    if free - result_nbytes >= reserved:  # the result will lie in memory, too
        free -= result_nbytes
    return min(MOST_NBYTES, max((free - reserved) // (SHARE * workers), limit // (FEWEST * workers)))


def cut(shape: tuple[int, ...], items: int, whole: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Return the sizes of blocks of about ``items``, as long as may be along the last axes; axis ``whole`` is not cut."""
    left = max(1, items // (shape[whole] if whole is not None else 1))
    sizes = []
    for axis in reversed(range(len(shape))):
        n = shape[axis]
        size = n if axis == whole else max(1, min(n, left))
        left = left if axis == whole else max(1, left // max(1, size))
        sizes.append(tuple(min(size, n - low) for low in range(0, n, size)) if n else (0,))
    return tuple(reversed(sizes))


class _Gather(BlockOperation):
    """Rows ``index`` along one axis. A round reads a span of the input in which there are some, from the first to the last of them."""

    name = "take"
    memory_inputs = True

    def __init__(self, shape: tuple[int, ...], itemsize: int, axis: int, index: NDArray, nbytes: int) -> None:
        self.itemsize: int
        self.shape, self.itemsize, self.axis, self.index = shape, itemsize, axis, index
        self.span_nbytes: int = min(SPAN_NBYTES, nbytes)
        sizes = cut((*shape[:axis], index.size, *shape[axis + 1 :]), nbytes // itemsize)
        rows = max(1, min(sizes[axis][0], nbytes // INDEX_NBYTES))
        along = tuple(min(rows, index.size - low) for low in range(0, index.size, rows))
        self.sizes = (*sizes[:axis], along, *sizes[axis + 1 :])

    def grid(self) -> tuple[tuple[int, ...], ...]:
        return self.sizes

    def needs(self, at: Box) -> tuple[Box, ...]:
        picked = self.index[at[self.axis]]
        return (self._box(at, int(picked.min()), int(picked.max()) + 1),)

    def rounds(self, at: Box) -> Iterator[tuple[Box, ...]]:
        picked = self.index[at[self.axis]]
        spans = picked // self._span(at)
        order = np.argsort(spans, kind="stable")
        edges = np.flatnonzero(np.diff(spans[order], prepend=-1, append=-1))
        for low, high in itertools.pairwise(edges.tolist()):
            rows = picked[order[low:high]]
            yield (self._box(at, int(rows.min()), int(rows.max()) + 1),)

    def run(self, out: NDArray, inputs: tuple[NDArray, ...], at: Box) -> None:
        self.add(out, inputs, at, 0)

    def add(self, out: NDArray, inputs: tuple[NDArray, ...], at: Box, k: int) -> None:
        picked = self.index[at[self.axis]]
        span = self._span(at)
        which = np.unique(picked // span)[k]
        places = np.flatnonzero(picked // span == which)
        rows = picked[places]
        key: Any = (*(slice(None),) * self.axis, places)
        out[key] = np.take(inputs[0], rows - rows.min(), axis=self.axis)

    def scratch(self, at: Box) -> int:
        row = self._row_nbytes(at)
        rows: int = at[self.axis].stop - at[self.axis].start
        return max(self.span_nbytes, row) + rows * (row + INDEX_NBYTES)

    def cost(self, at: Box) -> int:
        rows: int = at[self.axis].stop - at[self.axis].start
        return 4 * rows * self._row_nbytes(at)

    def _span(self, at: Box) -> int:
        return max(1, self.span_nbytes // max(1, self._row_nbytes(at)))

    def _row_nbytes(self, at: Box) -> int:
        """Return the bytes of a block that lie at one index."""
        items: int = math.prod(s.stop - s.start for a, s in enumerate(at) if a != self.axis)
        return self.itemsize * items

    def _box(self, at: Box, start: int, stop: int) -> Box:
        return (*at[: self.axis], slice(start, stop), *at[self.axis + 1 :])


def gather(x: Any, index: NDArray, axis: int, pool: Pool) -> list[Any]:
    """Return the rows ``index`` (1-D, integers from 0 to below the length, not none) along ``axis``, as pieces to be concatenated there."""
    row_nbytes = x.dtype.itemsize * math.prod(n for k, n in enumerate(x.shape) if k != axis)
    nbytes = block_nbytes(pool, index.size * row_nbytes)
    pieces = []
    for low in range(0, index.size, MOST_INDICES):
        piece = index[low : low + MOST_INDICES]
        operation = _Gather(x.shape, x.dtype.itemsize, axis, piece, nbytes)
        shape = (*x.shape[:axis], piece.size, *x.shape[axis + 1 :])
        key = ("take", x.shape, axis, piece.tobytes(), operation.sizes)
        pieces.append(wrap(make(Block, shape, x.dtype, operation, (x.node,), key)))
    return pieces


class _Pick(BlockOperation):
    """Elements at the indices that the inputs behind the first one hold, for ``count`` axes from ``axis`` on.

    ``names``: what the user calls these axes.
    """

    name = "take"
    memory_inputs = True

    def __init__(
        self, shape: tuple[int, ...], axis: int, count: int, picked: int, names: tuple[int, ...], sizes: tuple[tuple[int, ...], ...]
    ) -> None:
        self.shape, self.axis, self.count, self.picked, self.names, self.sizes = shape, axis, count, picked, names, sizes
        self.lengths = shape[axis : axis + count]

    def grid(self) -> tuple[tuple[int, ...], ...]:
        return self.sizes

    def needs(self, at: Box) -> tuple[Box, ...]:
        mine = at[self.axis : self.axis + self.picked]
        whole = tuple(slice(0, n) for n in self.lengths)
        return ((*at[: self.axis], *whole, *at[self.axis + self.picked :]), *(mine,) * self.count)

    def run(self, out: NDArray, inputs: tuple[NDArray, ...], at: Box) -> None:
        x, *given = inputs
        indices = [self._inside(index, n, name) for index, n, name in zip(given, self.lengths, self.names, strict=True)]
        if not x.flags.c_contiguous:  # `np.take` would copy all of it
            key: Any = (*(slice(None),) * self.axis, *indices)
            out[...] = x[key]
            return
        index, *rest = indices
        for one, n in zip(rest, self.lengths[1:], strict=True):
            index = index * n + one
        flat = x.reshape(*x.shape[: self.axis], math.prod(self.lengths), *x.shape[self.axis + self.count :])
        np.take(flat, index, self.axis, out, "clip")  # "raise" writes to a copy of `out` first

    def _inside(self, index: NDArray, n: int, name: int) -> NDArray:
        """Return the indices counted from the start. Raises IndexError for one that is out of bounds."""
        low, high = index.min(), index.max()
        if low < -n or high >= n:
            wrong = low if low < -n else high
            raise IndexError(f"index {wrong} is out of bounds for axis {name} with size {n}")
        index = index.astype(np.intp, copy=False)
        return index if low >= 0 else np.where(index < 0, index + n, index)

    def scratch(self, at: Box) -> int:
        return self._rows(at) * INDEX_NBYTES * (1 + self.count)

    def cost(self, at: Box) -> int:
        items: int = math.prod(s.stop - s.start for s in at)
        return 16 * (self._rows(at) * self.count + items)

    def _rows(self, at: Box) -> int:
        rows: int = math.prod(s.stop - s.start for s in at[self.axis : self.axis + self.picked])
        return rows


_operation = functools.lru_cache(maxsize=256)(_Pick)  # equal ones are one, and what is picked twice is picked once


def whole_reads(shape: tuple[int, ...], wholes: Sequence[Expr]) -> tuple[tuple[int, ...], ...]:
    """Return the sizes of the blocks of a result of ``shape`` that each read all of ``wholes``.

    As other tiles, but no smaller than what has to be copied for each: what lies outside the memory that all processes map.
    """
    copied = max((node.size for node in wholes if _is_copied(node)), default=0)
    sizes = map_grid(shape).sizes
    if math.prod(sizes) < copied:
        sizes = slab_sizes(shape, copied)
    return tuple(tuple(min(size, n - low) for low in range(0, n, size)) for n, size in zip(shape, sizes, strict=True))


def _is_copied(node: Expr) -> bool:
    while isinstance(node, View):
        node = node.x
    if not isinstance(node, Stored):
        return isinstance(node, InMemory)
    return not node.storage.is_role and (node.storage.is_shared or node.storage.is_spilled)


def pick(x: Any, indices: Sequence[Any], axis: int, names: tuple[int, ...]) -> Any:
    """Return ``x[..., *indices, ...]``, lazy: arrays of integers of one shape, not without axes, for the axes from ``axis`` on.

    ``names``: of these axes, in errors. An index out of bounds is an IndexError of the task that meets it.
    """
    count, picked = len(indices), indices[0].shape
    shape = (*x.shape[:axis], *picked, *x.shape[axis + count :])
    operation = _operation(x.shape, axis, count, len(picked), names, whole_reads(shape, [x.node]))
    nodes = (x.node, *(index.node for index in indices))
    return wrap(make(Block, shape, x.dtype, operation, nodes, ("pick", operation)))
