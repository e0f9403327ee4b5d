"""Which loops go over a tile: axes that every operand runs through as one are merged, the innermost loop is the cheapest to vectorise.

Promises: a nest depends on shapes, tile sizes, strides and reduced axes alone, and holds for every tile of the grid.
Never put here: LLVM, addresses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Loop", "Nest", "Traffic", "choose_nest", "lanes_of"]

LANE_NBYTES = 128  # of the widest dtype: two AVX-512 registers or four of AVX2, enough in flight to hide an addition's latency
GATHER_COST = 3.0  # a strided load, in units of a contiguous one


@dataclass(frozen=True, slots=True)
class Traffic:
    """How an operand lies, axis by axis of the program: strides in bytes, 0 where it does not move.

    ``exact``: these are its strides in every tile. Otherwise (it is copied tile by tile) it only keeps its axes apart.
    """

    strides: tuple[int, ...]
    itemsize: int
    exact: bool = True
    is_copied: bool = False
    offset: int = 0  # in bytes, of its first item in its buffer


@dataclass(frozen=True, slots=True)
class Loop:
    """Axes of the program that are gone through as one, outermost first, and whether a reduction goes over them."""

    axes: tuple[int, ...]
    reduced: bool


@dataclass(frozen=True, slots=True)
class Nest:
    """Loops, outermost first: kept ones, then reduced ones; the inner loop last, of either kind."""

    loops: tuple[Loop, ...]

    @property
    def inner(self) -> Loop:
        return self.loops[-1]

    def holds(self, shape: Sequence[int], sizes: Sequence[int], traffic: Sequence[Traffic]) -> bool:
        """Whether these loops, found for a larger part of the same array, go over tiles of ``sizes`` of a part of ``shape`` as well."""
        gone_through = {a for loop in self.loops for a in loop.axes}
        if any(size > 1 and a not in gone_through for a, size in enumerate(sizes)):
            return False
        pairs = [pair for loop in self.loops for pair in itertools.pairwise(loop.axes)]
        return all(sizes[b] == shape[b] and all(_runs_on(t, a, b, sizes[b]) for t in traffic) for a, b in pairs)


def lanes_of(itemsizes: Sequence[int]) -> int:
    """Return how many lanes a program has whose dtypes (parts of complex ones) have these sizes."""
    return LANE_NBYTES // max(itemsizes, default=8)


def choose_nest(
    shape: Sequence[int], sizes: Sequence[int], traffic: Sequence[Traffic], lanes: int, reduced_axes: Sequence[int] = ()
) -> Nest:
    """Return the loops for tiles of ``sizes`` of a space ``shape``."""
    loops: list[Loop] = []
    is_apart = False  # places along reduced axes do not run on over one of which a tile has a single item
    for axis, size in enumerate(sizes):
        if size == 1:
            is_apart |= shape[axis] > 1 and axis in reduced_axes
            continue
        reduced = axis in reduced_axes
        if (
            loops
            and not is_apart
            and loops[-1].reduced == reduced
            and size == shape[axis]
            and all(_runs_on(t, loops[-1].axes[-1], axis, size) for t in traffic)
        ):
            loops[-1] = Loop((*loops[-1].axes, axis), reduced)
        else:
            loops.append(Loop((axis,), reduced))
    if not loops:
        return Nest((Loop((), bool(reduced_axes) and len(reduced_axes) == len(shape)),))
    inner = min(range(len(loops)), key=lambda i: (_cost(loops[i], sizes, traffic, lanes), -i))
    kept = [loop for i, loop in enumerate(loops) if not loop.reduced and i != inner]
    reduced_loops = [loop for i, loop in enumerate(loops) if loop.reduced and i != inner]
    return Nest((*kept, *reduced_loops, loops[inner]))


def _runs_on(t: Traffic, outer: int, inner: int, size: int) -> bool:
    """Whether an operand goes from the end of one step of ``outer`` straight on into the next."""
    if not t.exact and (t.strides[outer] or t.strides[inner]):
        return False
    return t.strides[outer] == t.strides[inner] * size


def _cost(loop: Loop, sizes: Sequence[int], traffic: Sequence[Traffic], lanes: int) -> float:
    """Return what a strip of lanes along this loop costs per item."""
    count = math.prod(sizes[a] for a in loop.axes)
    waste = -(-count // lanes) * lanes / count
    loads = 0.0
    for t in traffic:
        stride = t.strides[loop.axes[-1]]
        if stride:
            loads += 1.0 if t.exact and abs(stride) == t.itemsize else GATHER_COST
    return waste * (1.0 + loads)
