"""Accumulations in the NumPy engine: many items, few cells; each item says which cell it goes to, and is added to it.

    box of items (a split)  --blocks in C order-->  cells of its own  -->  partial[split]  --`FinishKernel`-->  result

Cells are found by edges (histograms) or given by number (`bincount`, ``ufunc.at``), and numbered in C order.

Promises: splits and the order within them follow from shapes alone, so results are bit-identical whoever computes which
task. A task begins with fresh cells, and so may be run twice. Nothing is added for items outside the edges, nor for NaN; a value
on an edge belongs to the bin on its right, but for the last edge, which closes its bin: exactly as NumPy counts.
Never put here: grids (`tiles`), what NumPy's functions make of their arguments (`ops.accumulators`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scheduler.segments import Remote
from scheduler.task import Context
from shmarray.kernels.numpy import Evaluator, open_window, put
from shmarray.kernels.program import Operand, Program
from shmarray.tiles import Grid, blocks

__all__ = ["AccumulateKernel", "BinFinder", "identity_of"]

NDArray = np.ndarray[Any, Any]
NEAR_AN_EDGE = 2.0**-20  # of a bin: how far from the edges the place of a value in even bins can be trusted
LARGEST_EXACT = 2**53  # integers below are exact in float64


class BinFinder:
    """Finds the bin of values along one axis, given the edges: ``n + 1`` of them for ``n`` bins, ascending.

    Where edges lie evenly the bin is computed, ``(x - first) * n / (last - first)``. That function does not decrease, rounding included,
    so that, when each edge comes out at its own number but for `NEAR_AN_EDGE`, the bin of every value that comes out further than that
    from a whole number is certain; those nearer are compared with that edge. Otherwise edges are searched by bisection.
    """

    def __init__(self, edges: NDArray) -> None:
        self.edges = edges
        self.count = len(edges) - 1
        self.wide = edges.astype(np.float64)
        with np.errstate(all="ignore"):
            self.scale = np.float64(self.count) / (self.wide[-1] - self.wide[0])
            off = np.abs((self.wide - self.wide[0]) * self.scale - np.arange(self.count + 1))
            is_exact = edges.dtype.kind == "f" or np.abs(self.wide).max() < LARGEST_EXACT
        self.is_even = bool(is_exact and np.isfinite(self.wide).all() and np.isfinite(self.scale) and (off < NEAR_AN_EDGE).all())
        self.is_one = bool(self.is_even and self.count == 1)

    def holds_all(self, x: NDArray) -> bool:
        """Whether no value lies outside the edges."""
        return bool(x.min() >= self.edges[0] and x.max() <= self.edges[-1])  # NaN is neither

    def held(self, x: NDArray) -> NDArray:
        """Return which values do not lie outside the edges."""
        inside: NDArray = x >= self.edges[0]
        inside &= x <= self.edges[-1]
        return inside

    def find(self, x: NDArray, out: NDArray, scratch: NDArray) -> None:
        """Write the numbers of the bins of ``x``, all of which the edges hold, into ``out``; both arrays are of float64."""
        if self.is_one:
            out.fill(0.0)
            return
        if not self.is_even:
            found = self.edges.searchsorted(x, "right")
            found -= 1
            np.minimum(found, self.count - 1, out=out)
            return
        np.subtract(x, self.wide[0], out=out)
        np.multiply(out, self.scale, out=out)
        np.rint(out, out=scratch)
        np.subtract(out, scratch, out=scratch)
        np.abs(scratch, out=scratch)
        if scratch.min() >= NEAR_AN_EDGE:
            np.floor(out, out=out)
            return
        near = np.flatnonzero(scratch < NEAR_AN_EDGE)
        edge = np.rint(out[near])
        np.floor(out, out=out)
        edge -= x[near] < self.wide[edge.astype(np.intp)]
        out[near] = np.minimum(edge, self.count - 1)


def identity_of(ufunc: str, dtype: np.dtype[Any], *, is_at: bool) -> Any:
    """Return what a cell begins with: ``ufunc`` of it and anything gives that; sums of ``bincount`` begin with 0.0, even of -0.0."""
    if ufunc in ("minimum", "maximum"):
        if dtype.kind == "b":
            return ufunc == "minimum"
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            return limits.max if ufunc == "minimum" else limits.min
        return np.inf if ufunc == "minimum" else -np.inf
    if ufunc == "add" and is_at and dtype.kind in "fc":
        return -0.0 if dtype.kind == "f" else complex(-0.0, -0.0)
    return np.array({"add": 0, "multiply": 1, "bitwise_or": 0, "bitwise_xor": 0, "bitwise_and": -1}[ufunc]).astype(dtype)[()]


@dataclass(frozen=True, slots=True)
class AccumulateKernel:
    """Adds the items of a box of the grid, a split, to cells of its own.

    ``data``: registers with the coordinate along each axis of the cells, which ``tables`` (edges) turn into bins; or, without tables,
    with the index along that axis. ``values``: the register with what to add; None: 1. ``out``: the cells, with an axis more, in
    front, for the splits where there are several. ``is_at``: it is a ``ufunc.at``, which warns of overflow; `bincount` does not.
    """

    program: Program
    grid: Grid
    cells: tuple[int, ...]
    ufunc: str
    data: tuple[int, ...]
    values: int | None
    tables: tuple[Operand, ...]
    out: Operand
    is_at: bool
    label: str
    line: str

    def bind(self, context: Context) -> Callable[[int], None]:
        grid, cells = self.grid, self.cells
        # NumPy's own object, not an equal one out of a pickle, without which ufunc.at is a hundred times slower.
        dtype = np.dtype(self.out.dtype.str)
        registers = [*self.data, *(() if self.values is None else (self.values,))]
        evaluator = Evaluator(self.program, context, math.prod(grid.sizes), registers)
        sizes = grid.block_sizes
        room = math.prod(sizes)
        tables = [open_window(context, operand) for operand in self.tables]
        target = open_window(context, self.out)
        start = identity_of(self.ufunc, dtype, is_at=self.is_at)
        add_at = getattr(np, self.ufunc).at
        everything = tuple([slice(0, n) for n in cells])
        is_split = len(self.out.shape) > len(cells)
        placer = _Placer(cells, room) if tables else _Checker(cells, self.label, from_the_end=self.is_at)
        read: list[NDArray] | None = None
        quiet = {} if self.is_at else {"over": "ignore", "invalid": "ignore"}

        def run(index: int) -> None:
            nonlocal read
            # Not before: edges may be computed by the plan; and each time, for this is bound once for many steps of a simulation.
            now = [np.array(t.read() if isinstance(t, Remote) else t) for t in tables]
            if read is None or not all(map(np.array_equal, read, now)):
                placer.finders, read = [BinFinder(edges) for edges in now], now
            tile = grid.box(index)
            mine = np.full(cells, start, dtype)
            flat = mine.reshape(-1)
            evaluator.begin(tile)
            with evaluator.errstate():
                for box in blocks(tile, sizes):
                    registers = evaluator.run(box)
                    shape = tuple([piece.stop - piece.start for piece in box])
                    data = [_flat(registers[r], shape) for r in self.data]
                    values: Any = 1 if self.values is None else _flat(registers[self.values], shape)
                    evaluator.current = self.label, self.line
                    with np.errstate(**quiet):  # type: ignore[arg-type]  # modes, by kind
                        at, held = placer.place(data)
                        if held is not None and self.values is not None:
                            values = values[held]
                        if self.values is not None:
                            values = values.astype(dtype) if values.dtype != dtype else values.view(dtype)
                        add_at(flat, at, values)
            evaluator.end(tile)
            if is_split:
                put(target, (slice(index, index + 1), *everything), mine[None])
            else:
                put(target, everything, mine)

        return run


def _flat(values: NDArray, shape: tuple[int, ...]) -> NDArray:
    return (values if values.shape == shape else np.broadcast_to(values, shape)).reshape(-1)


class _Placer:
    """Numbers of cells from coordinates: the bins along all axes, in C order."""

    def __init__(self, shape: tuple[int, ...], room: int) -> None:
        self.finders: list[BinFinder] = []
        self.shape = shape
        self.one, self.bins, self.scratch = np.empty(room), np.empty(room), np.empty(room)
        self.cells = np.empty(room, np.intp)

    def place(self, data: list[NDArray]) -> tuple[NDArray, NDArray | None]:
        """Return the cells of what all edges hold, and which items that are (None: all of them)."""
        held: NDArray | None = None
        if not all(finder.holds_all(x) for finder, x in zip(self.finders, data, strict=True)):
            held = np.logical_and.reduce([finder.held(x) for finder, x in zip(self.finders, data, strict=True)])
            data = [x[held] for x in data]
        n = len(data[0])
        cells, bins, scratch, one = self.cells[:n], self.bins[:n], self.scratch[:n], self.one[:n]
        if not n:
            return cells, held
        for axis, (finder, x) in enumerate(zip(self.finders, data, strict=True)):
            if axis == 0:
                finder.find(x, bins, scratch)
                continue
            finder.find(x, one, scratch)
            np.multiply(bins, self.shape[axis], out=bins)  # exact: cells are fewer than 2^53
            np.add(bins, one, out=bins)
        np.copyto(cells, bins, casting="unsafe")
        return cells, held


def _not_counted(label: str, wrong: Any, n: int) -> str:
    if wrong < 0:
        return f"'list' argument must have no negative elements: {label} met {wrong}"
    return (
        f"{label} met {wrong}, and its result has length {n}: in a step the length must be known: give minlength, larger than all that is "
        f"counted (elsewhere it is what the numbers were at the call)"
    )


class _Checker:
    """Numbers of cells from indices along all axes, where there are such cells."""

    def __init__(self, shape: tuple[int, ...], label: str, *, from_the_end: bool) -> None:
        self.finders: list[BinFinder] = []
        self.shape, self.label, self.from_the_end = shape, label, from_the_end

    def place(self, data: list[NDArray]) -> tuple[NDArray, NDArray | None]:
        """Return the cells. Raises IndexError for an index out of bounds, ValueError for a number that `bincount` has no place for."""
        cells: NDArray | None = None
        for axis, (given, n) in enumerate(zip(data, self.shape, strict=True)):
            low, high = given.min(), given.max()
            if low < (-n if self.from_the_end else 0) or high >= n:
                wrong = high if high >= n else low
                if not self.from_the_end:
                    raise ValueError(_not_counted(self.label, wrong, n))
                raise IndexError(f"{self.label}: index {wrong} is out of bounds for axis {axis} with size {n}")
            index = given.astype(np.intp, copy=False)
            if low < 0:
                index = np.where(index < 0, index + n, index)
            cells = index if cells is None else cells * n + index
        assert cells is not None
        return cells.view(np.intp), None
