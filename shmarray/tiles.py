"""The planner's own grids: which boxes of an iteration space one task does, and which fit the cache.

Promises: a grid depends on shape and reduced axes alone, never on dtype of other operands, chunks or workers; therefore
results do not, either. Only where part of the input is made within the tasks (a user's function of chunks, a source) are the
tiles given: by that. Sizes are powers of two where there is a choice, so that leaves of sums align.
Never put here: memory, kernels, chunks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shmarray.region import Box

__all__ = [
    "Edges",
    "Grid",
    "PartGrid",
    "accumulation_grid",
    "block_sizes",
    "blocks",
    "edges_of",
    "in_small_tiles",
    "map_grid",
    "part_grid",
    "reduction_grid",
    "slab_sizes",
    "walked_grid",
]

Edges = tuple[tuple[int, ...], ...]  # per axis, where each tile begins, and the length of the axis

BLOCK_ITEMS = 1 << 16  # what stays in cache while a fused chain runs over it: 256 KiB of float64
TILE_ITEMS = 1 << 17  # 1 MiB of float64: 0.1 to 1 ms of work, so that a range of tiles can be cut anywhere
REDUCTION_TILE_ITEMS = 1 << 18
MOST_PARTIAL_ITEMS = 1 << 20  # partial results of one reduction, in items: a constant, however large the input
ENOUGH_TASKS = 64  # so many tasks feed every core of a large machine evenly
FEW_SPLITS = 8  # of reduced axes, where the tiles are given and one of them has more results than MOST_PARTIAL_ITEMS
NARROWEST_ITEMS = 1 << 10  # a column slab narrower than this wastes cache lines and pages


@dataclass(frozen=True, slots=True)
class Grid:
    """Boxes that tile ``shape``, numbered in C order: a task does one.

    Regular: boxes of ``sizes`` (per axis; the last of an axis may be smaller), each of them one tile. With ``edges`` a tile begins
    where these say, and a box is ``group`` tiles along each axis, walked one after the other; ``sizes`` are those of the
    largest tile.

        edges (0, 3, 5, 9, 12), group 2      |  0..3  3..5  |  5..9  9..12  |      two boxes of two tiles each
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    inner: tuple[int, ...] | None = None  # sizes of cache blocks; None: slabs of `BLOCK_ITEMS`
    edges: Edges | None = None
    group: tuple[int, ...] = ()

    @staticmethod
    def of(edges: Edges, group: tuple[int, ...] | None = None) -> Grid:
        """Return the grid of tiles between ``edges``, ``group`` of them (one, if not said) to a box."""
        sizes = tuple(max((b - a for a, b in itertools.pairwise(axis)), default=0) for axis in edges)
        return Grid(tuple(axis[-1] for axis in edges), sizes, None, edges, (1,) * len(edges) if group is None else group)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """The sizes of the cache blocks that a tile is worked through in."""
        return slab_sizes(self.sizes, BLOCK_ITEMS) if self.inner is None else self.inner

    @property
    def is_regular(self) -> bool:
        """Whether every box begins at a multiple of ``sizes``."""
        return self.edges is None

    @property
    def counts(self) -> tuple[int, ...]:
        """How many boxes along each axis."""
        if self.edges is not None:
            return tuple(-(-(len(axis) - 1) // g) for axis, g in zip(self.edges, self.group, strict=True))
        return tuple(-(-n // s) for n, s in zip(self.shape, self.sizes, strict=True))

    @property
    def ntasks(self) -> int:
        return math.prod(self.counts)

    @property
    def items_per_task(self) -> int:
        """How many items the largest box has, or a little more."""
        return math.prod(self.sizes) * math.prod(self.group)

    def index(self, number: int) -> tuple[int, ...]:
        """Return the index, per axis, of box ``number``."""
        counts = self.counts
        if len(counts) == 1:
            return (number,)
        result = []
        for count in reversed(counts):
            number, k = divmod(number, count)
            result.append(k)
        return tuple(reversed(result))

    def box(self, index: int) -> Box:
        """Return box number ``index``."""
        if self.edges is not None:
            return tuple([slice(axis[r.start], axis[r.stop]) for axis, r in zip(self.edges, self.tile_ranges(index), strict=True)])
        result: list[slice] = []
        for n, size in zip(reversed(self.shape), reversed(self.sizes), strict=True):
            index, k = divmod(index, -(-n // size))
            result.append(slice(k * size, min(n, k * size + size)))
        return tuple(reversed(result))

    def tile_ranges(self, index: int) -> tuple[range, ...]:
        """Return which tiles, per axis, are in box number ``index`` of a grid with edges."""
        assert self.edges is not None
        places = zip(self.edges, self.group, self.index(index), strict=True)
        return tuple([range(k * g, min(k * g + g, len(axis) - 1)) for axis, g, k in places])

    def tiles(self, index: int) -> Iterator[Box]:
        """Yield the tiles of box number ``index`` in C order."""
        if self.edges is None:
            return iter((self.box(index),))
        pieces = [[slice(axis[k], axis[k + 1]) for k in r] for axis, r in zip(self.edges, self.tile_ranges(index), strict=True)]
        return itertools.product(*pieces)

    def lengths(self, axis: int) -> list[int]:
        """Return how long the boxes are along ``axis``, one after the other."""
        if self.edges is None:
            n, size = self.shape[axis], self.sizes[axis]
            return [min(size, n - low) for low in range(0, n, size)]
        cuts = [*self.edges[axis][: -1 : self.group[axis]], self.shape[axis]]
        return [b - a for a, b in itertools.pairwise(cuts)]

    def slabs(self, axis: int) -> Callable[[int, int], tuple[int, int]]:
        """Return what tells, of boxes cut along ``axis`` alone, where [start, stop) of them begin and end along it."""
        size, n = self.sizes[axis], self.shape[axis]
        return lambda start, stop: (start * size, min(stop * size, n))

    def slab_axis(self) -> int | None:
        """Return the only axis that is cut, if all axes before it have length 1 (-1 when none is cut), else None."""
        if self.edges is not None:
            return None
        cut = [a for a, count in enumerate(self.counts) if count > 1]
        if not cut:
            return -1
        return cut[0] if len(cut) == 1 and all(n == 1 for n in self.shape[: cut[0]]) else None


@dataclass(frozen=True, slots=True)
class PartGrid(Grid):
    """What the boxes of ``whole`` have of a part of its shape that begins at ``low``, under their numbers; some may have nothing.

    Indices are the part's own; ``sizes`` are those of the largest such box, and all of an axis only where no box has less of it.
    """

    whole: Grid = Grid((), ())
    low: tuple[int, ...] = ()

    @property
    def is_regular(self) -> bool:
        return False

    @property
    def counts(self) -> tuple[int, ...]:
        return self.whole.counts

    def slabs(self, axis: int) -> Callable[[int, int], tuple[int, int]]:
        size, low, n = self.whole.sizes[axis], self.low[axis], self.shape[axis]
        return lambda start, stop: (max(start * size - low, 0), min(stop * size - low, n))

    def slab_axis(self) -> int | None:
        axis = self.whole.slab_axis()
        return axis if axis == -1 or axis is None or all(n == 1 for n in self.shape[:axis]) else None

    def box(self, index: int) -> Box:
        return tuple(
            [
                slice(min(max(piece.start - low, 0), n), min(max(piece.stop - low, 0), n))
                for piece, low, n in zip(self.whole.box(index), self.low, self.shape, strict=True)
            ]
        )


def part_grid(whole: Grid, part: Box) -> PartGrid:
    """Return the grid of a part of the shape of a regular grid."""
    shape = tuple(piece.stop - piece.start for piece in part)
    sizes = tuple(_largest_piece(piece.start, piece.stop, size) for piece, size in zip(part, whole.sizes, strict=True))
    inner = None if whole.inner is None else tuple(min(n, size) for n, size in zip(whole.inner, sizes, strict=True))
    return PartGrid(shape, sizes, inner, whole=whole, low=tuple(piece.start for piece in part))


def _largest_piece(start: int, stop: int, size: int) -> int:
    """Return how much of ``start:stop`` lies at most between two multiples of ``size``."""
    first, last = start // size, (stop - 1) // size
    if first == last:
        return stop - start
    return size if last - first > 1 else max(size - start % size, (stop - 1) % size + 1)


def edges_of(sizes: tuple[tuple[int, ...], ...]) -> Edges:
    """Return the edges between tiles of given sizes per axis."""
    return tuple(tuple(itertools.accumulate(axis, initial=0)) for axis in sizes)


def slab_sizes(shape: tuple[int, ...], items: int) -> tuple[int, ...]:
    """Return box sizes of about ``items`` items, inner axes whole as long as they fit: contiguous in a C-ordered array."""
    sizes = []
    room = max(1, items)
    for n in reversed(shape):
        size = min(max(n, 1), room)
        room = max(1, room // size)
        sizes.append(size)
    return tuple(reversed(sizes))


def map_grid(shape: tuple[int, ...], across: tuple[int, int] | None = None, most: int = 1) -> Grid:
    """Return the grid for filling an array of ``shape``: slabs, or squares in the two axes ``across``.

    ``most``: slabs may be so many times as large, where enough remain.

    Squares are for operands whose memory runs along different axes: whichever way a line of cache goes, all of it is used.
    """
    if across is None:
        return Grid(shape, slab_sizes(shape, max(TILE_ITEMS, min(most * TILE_ITEMS, math.prod(shape) // ENOUGH_TASKS))))
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


def accumulation_grid(shape: tuple[int, ...], count: int) -> Grid:
    """Return the grid of the items of ``shape`` that are added to ``count`` cells: a split, with partial results of its own, is a box.

    Partial results take no more than a constant, or, of many cells, `FEW_SPLITS` times the result and half as many items as the input
    has. Of more cells than that there is one task: where each range of cells had one, that went through all items, it took longer.
    """
    total = math.prod(shape)
    most = min(1024, max(MOST_PARTIAL_ITEMS // count, min(FEW_SPLITS, total // (2 * count))))
    if total <= REDUCTION_TILE_ITEMS or most < 2:
        return Grid(shape, tuple(max(n, 1) for n in shape))
    items = max(REDUCTION_TILE_ITEMS, -(-total // most))
    while True:
        grid = Grid(shape, slab_sizes(shape, items))
        if grid.ntasks <= most:
            return grid
        items += items // 4  # boxes are whole rows, so that there may be more of them than wanted


def walked_grid(edges: Edges, axes: tuple[int, ...]) -> Grid:
    """Return the grid for reducing over ``axes`` an array whose tiles are given: a task walks through several.

    As in `reduction_grid`, reduced axes are cut into splits only where the kept ones give too few tasks, and partial results
    take no more than a constant. Where tiles are so large that they would, which cannot be cut, they take `FEW_SPLITS` times the
    result, and no more than a quarter of the input.
    """
    counts = [len(axis) - 1 for axis in edges]
    kept = math.prod(counts[a] for a in range(len(edges)) if a not in axes)
    reduced = math.prod(counts[a] for a in axes)
    out_items = math.prod(edges[a][-1] for a in range(len(edges)) if a not in axes)
    allowed = max(MOST_PARTIAL_ITEMS // max(1, out_items), min(FEW_SPLITS, reduced // 4), 1)
    most = min(reduced, allowed, 1024)
    each = reduced if kept >= ENOUGH_TASKS or most < 2 else -(-reduced // most)
    while True:
        group = [1] * len(edges)
        room = each
        for a in reversed(axes):
            group[a] = min(counts[a], room)
            room = max(1, room // group[a])
        if each >= reduced or math.prod(-(-counts[a] // group[a]) for a in axes) <= most:
            return Grid.of(edges, tuple(group))
        each += each  # the split of one axis into equal parts may leave more of them than wanted


def thinner(grid: Grid, items: int) -> Grid | None:
    """Return a grid of slabs of about ``items`` items along the axis that ``grid`` is cut along; None where it has no such axis."""
    axis = grid.slab_axis()
    if axis is None or axis < 0 or not grid.is_regular:
        return None
    thickness = max(1, items // max(1, math.prod(grid.shape[axis + 1 :])))
    return Grid(grid.shape, (*grid.sizes[:axis], min(grid.shape[axis], thickness), *grid.sizes[axis + 1 :]), grid.inner)


def in_small_tiles(grid: Grid, axes: tuple[int, ...]) -> Grid:
    """Return a regular reduction grid with its boxes walked through in tiles that fit a scratch, where they are larger than that."""
    if math.prod(grid.sizes) <= 2 * REDUCTION_TILE_ITEMS:
        return grid
    room = max(1, REDUCTION_TILE_ITEMS // math.prod(size for a, size in enumerate(grid.sizes) if a not in axes))
    tile, group = list(grid.sizes), [1] * len(grid.sizes)
    for a in reversed(axes):
        tile[a] = min(grid.sizes[a], room)
        room = max(1, room // tile[a])
        group[a] = -(-grid.sizes[a] // tile[a])
    edges = tuple(
        (*(low for start in range(0, n, size) for low in range(start, min(n, start + size), step)), n)
        for n, size, step in zip(grid.shape, grid.sizes, tile, strict=True)
    )
    return Grid.of(edges, tuple(group))


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
