"""Elements picked by integer arrays, of arrays in the spill file or without values yet: block by block, each reading what it picks.

Promises: NumPy's values and errors; memory for blocks alone, whatever the array and the index.
Never put here: which indices mean what (``shaping``), arrays that lie in memory, where one call of NumPy is sooner done.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from shmarray.expr import Block, BlockOperation, Stored, make, postorder
from shmarray.handle import wrap
from shmarray.region import Box

if TYPE_CHECKING:
    from scheduler.run import Pool

__all__ = ["block_nbytes", "cut", "gather", "spilling_pool", "tracing_pool"]

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
