"""A layer of several programs, each for a part of one space: what an array put together is made of, tile by tile.

    tile 3 of the grid  ----------------------------------------      a tile has something of a few parts: the task runs these programs,
                        | left |      interior          | right |      each on what the tile has of its part (`tiles.PartGrid`)

Promises: parts do not overlap, so that their order is nothing to the values; a task does what its tile has of them and nothing else.
Never put here: how a part is computed, which parts there are (`hoist`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from scheduler.task import Context
from shmarray.kernels.numpy import MapKernel, Together
from shmarray.kernels.program import Operand, Program
from shmarray.region import Box
from shmarray.tiles import Grid, part_grid

__all__ = ["PartsKernel"]


@dataclass(frozen=True, slots=True)
class PartsKernel:
    """Programs and where in the space of ``grid`` each of them belongs. ``parts``: plain kernels, or all of them compiled."""

    parts: tuple[Any, ...]
    places: tuple[Box, ...]
    grid: Grid
    outs: tuple[Operand, ...]  # what is written, as a whole

    @property
    def largest(self) -> Any:
        """The part with the most items: what a look at the layer looks at."""
        return max(self.parts, key=lambda part: part.grid.items_per_task)

    @property
    def program(self) -> Program:
        program: Program = self.largest.program
        return program

    @property
    def plain(self) -> PartsKernel:
        """The same for the NumPy engine."""
        return replace(self, parts=tuple(part if isinstance(part, MapKernel) else part.plain for part in self.parts))

    def on(self, grid: Grid) -> PartsKernel | None:
        """Return the same in other tiles, cut along one axis as before; None where that cannot be."""
        parts = tuple(part.on(part_grid(grid, place)) for part, place in zip(self.parts, self.places, strict=True) if hasattr(part, "on"))
        return replace(self, parts=parts, grid=grid) if len(parts) == len(self.parts) and all(parts) else None

    def bind(self, context: Context) -> Callable[[int], None]:
        bound: list[Callable[[int], None] | None] = [None] * len(self.parts)
        bounds = [[(piece.start, piece.stop) for piece in place] for place in self.places]
        grid = self.grid

        def has(tile: Box, number: int) -> bool:
            return all(piece.stop > start and piece.start < stop for piece, (start, stop) in zip(tile, bounds[number], strict=True))

        def part(number: int) -> Callable[[int], None]:
            run_part = bound[number]
            if run_part is None:
                run_part = bound[number] = self.parts[number].bind(context)
            return run_part

        def run(index: int) -> None:
            tile = grid.box(index)
            for number in range(len(bounds)):
                if has(tile, number):
                    part(number)(index)

        axis = grid.slab_axis()
        slabs = [part.grid.slabs(axis) for part in self.parts] if axis not in (None, -1) else []

        def run_together(start: int, stop: int) -> None:
            for number, slab in enumerate(slabs):
                low, high = slab(start, stop)
                if low >= high:
                    continue
                many = getattr(part(number), "many", None)
                if many is not None:
                    many(start, stop)
                    continue
                for index in range(start, stop):
                    if has(grid.box(index), number):
                        part(number)(index)

        return Together(run, run_together) if slabs else run

    def __reduce__(self) -> tuple[Any, ...]:
        codes = list(dict.fromkeys(getattr(part, "code", b"") for part in self.parts))
        numbers = tuple(codes.index(getattr(part, "code", b"")) for part in self.parts)
        parts = tuple(replace(part, code=b"") if hasattr(part, "code") else part for part in self.parts)
        return _loaded, (pickle.dumps((parts, self.places, self.grid, self.outs, codes, numbers), pickle.HIGHEST_PROTOCOL),)


def _loaded(blob: bytes) -> PartsKernel:
    parts, places, grid, outs, codes, numbers = pickle.loads(blob)
    whole = tuple(replace(part, code=codes[n]) if hasattr(part, "code") else part for part, n in zip(parts, numbers, strict=True))
    return PartsKernel(whole, places, grid, outs)
