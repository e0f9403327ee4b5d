"""The planner's own grids: which boxes of an iteration space one task does, and which fit the cache.

Promises: a grid depends on shape and reduced axes alone, never on dtype of other operands, chunks or workers; therefore
results do not, either. Sizes are powers of two where there is a choice, so that leaves of sums align.
Never put here: memory, kernels, chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from shmarray.region import Box

__all__ = ["Grid", "block_sizes", "blocks", "map_grid", "reduction_grid", "slab_sizes"]

BLOCK_ITEMS = 1 << 16  # what stays in cache while a fused chain runs over it: 256 KiB of float64
TILE_ITEMS = 1 << 17  # 1 MiB of float64: 0.1 to 1 ms of work, so that a range of tiles can be cut anywhere
REDUCTION_TILE_ITEMS = 1 << 18
MOST_PARTIAL_ITEMS = 1 << 20  # partial results of one reduction, in items: a constant, however large the input
ENOUGH_TASKS = 64  # so many tasks feed every core of a large machine evenly
NARROWEST_ITEMS = 1 << 10  # a column slab narrower than this wastes cache lines and pages


@dataclass(frozen=True, slots=True)
class Grid:
    """Boxes of ``sizes`` (per axis; the last of an axis may be smaller) that tile ``shape``, numbered in C order."""

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    inner: tuple[int, ...] | None = None  # sizes of cache blocks; None: slabs of `BLOCK_ITEMS`

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """The sizes of the cache blocks that a tile is worked through in."""
        return slab_sizes(self.sizes, BLOCK_ITEMS) if self.inner is None else self.inner

    @property
    def counts(self) -> tuple[int, ...]:
        """How many boxes along each axis."""
        return tuple(-(-n // s) for n, s in zip(self.shape, self.sizes, strict=True))

    @property
    def ntasks(self) -> int:
        return math.prod(self.counts)

    def box(self, index: int) -> Box:
        """Return box number ``index``."""
        result: list[slice] = []
        for n, size in zip(reversed(self.shape), reversed(self.sizes), strict=True):
            index, k = divmod(index, -(-n // size))
            result.append(slice(k * size, min(n, k * size + size)))
        return tuple(reversed(result))

    def slab_axis(self) -> int | None:
        """Return the only axis that is cut, if all axes before it have length 1 (-1 when none is cut), else None."""
        cut = [a for a, count in enumerate(self.counts) if count > 1]
        if not cut:
            return -1
        return cut[0] if len(cut) == 1 and all(n == 1 for n in self.shape[: cut[0]]) else None


def slab_sizes(shape: tuple[int, ...], items: int) -> tuple[int, ...]:
    """Return box sizes of about ``items`` items, inner axes whole as long as they fit: contiguous in a C-ordered array."""
    sizes = []
    room = max(1, items)
    for n in reversed(shape):
        size = min(max(n, 1), room)
        room = max(1, room // size)
        sizes.append(size)
    return tuple(reversed(sizes))


def map_grid(shape: tuple[int, ...], across: tuple[int, int] | None = None) -> Grid:
    """Return the grid for filling an array of ``shape``: slabs, or squares in the two axes ``across``.

    Squares are for operands whose memory runs along different axes: whichever way a line of cache goes, all of it is used.
    """
    if across is None:
        return Grid(shape, slab_sizes(shape, TILE_ITEMS))
    side, edge = math.isqrt(TILE_ITEMS), math.isqrt(BLOCK_ITEMS)
    sizes = tuple(min(max(n, 1), side) if a in across else 1 for a, n in enumerate(shape))
    return Grid(shape, sizes, tuple(min(n, edge) for n in sizes))


def reduction_grid(shape: tuple[int, ...], axes: tuple[int, ...]) -> Grid:
    """Return the grid for reducing ``shape`` over ``axes``.

    Where cutting the kept axes alone gives enough tasks, reduced axes stay whole and there are no partial results. Otherwise
    they are cut too, so that partial results take no more than a constant.
    """
    kept = tuple(1 if a in axes else n for a, n in enumerate(shape))
    total = math.prod(shape)
    if total <= REDUCTION_TILE_ITEMS:
        return Grid(shape, tuple(max(n, 1) for n in shape))
    inner_kept = bool(shape) and (len(shape) - 1) not in axes
    out_items = math.prod(kept)
    wanted = max(ENOUGH_TASKS, min(1024, total // REDUCTION_TILE_ITEMS))
    narrowest = min(NARROWEST_ITEMS, kept[-1]) if inner_kept else 1
    kept_sizes = slab_sizes(kept, max(narrowest, out_items // wanted))
    enough = math.prod(-(-n // s) for n, s in zip(kept, kept_sizes, strict=True)) >= min(ENOUGH_TASKS, total // REDUCTION_TILE_ITEMS)
    splits_allowed = max(1, MOST_PARTIAL_ITEMS // max(1, out_items))
    whole = tuple(max(n, 1) if a in axes else kept_sizes[a] for a, n in enumerate(shape))
    if enough or splits_allowed < 4:
        return Grid(shape, whole)
    # Few outputs: cut the reduced axes, outermost first, into slabs that are as contiguous as the array is.
    kept_sizes = kept if out_items <= REDUCTION_TILE_ITEMS else slab_sizes(kept, REDUCTION_TILE_ITEMS)
    items = max(REDUCTION_TILE_ITEMS, -(-total // min(splits_allowed, 1024)))
    room = max(1, items // math.prod(kept_sizes))
    sizes = list(kept_sizes)
    for a in reversed(axes):
        sizes[a] = min(shape[a], room)
        room = max(1, room // sizes[a])
    return Grid(shape, tuple(sizes))


def block_sizes(shape: tuple[int, ...], items: int = BLOCK_ITEMS) -> tuple[int, ...]:
    """Return the sizes of the cache blocks of a tile of ``shape``."""
    return slab_sizes(shape, items)


def blocks(box: Box, sizes: tuple[int, ...]) -> Iterator[Box]:
    """Yield the blocks of ``sizes`` that tile ``box``, in C order."""
    if not box:
        yield ()
        return
    cuts = [
        [slice(low, min(low + size, piece.stop)) for low in range(piece.start, piece.stop, size)]
        for piece, size in zip(box, sizes, strict=True)
    ]
    if len(cuts) == 1:
        for cut in cuts[0]:
            yield (cut,)
        return
    index = [0] * len(cuts)
    while True:
        yield tuple(cut[i] for cut, i in zip(cuts, index, strict=True))
        for a in range(len(cuts) - 1, -1, -1):
            index[a] += 1
            if index[a] < len(cuts[a]):
                break
            index[a] = 0
        else:
            return
