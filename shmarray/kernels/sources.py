"""What makes an array box by box: a block operation, something that only the driver can slice, pieces.

A source is written straight into memory (`BlockKernel`), or is an operand of a fused program (`program.Operand`), made within the
task tile by tile. Where it has ``edges`` it must be asked for the boxes between them, once each: whole chunks of a user's
function, whole chunks of a file.
Promises: a user's function sees read-only arrays, and what it raises names the chunk and the line; nothing is made that was not asked for.
Never put here: which nodes are made within a task (`passes`), grids (`tiles`).
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scheduler.segments import Remote
from scheduler.task import Context
from shmarray.expr import BlockOperation
from shmarray.kernels.numpy import MOST_STAGED_ITEMS, Evaluator, open_window
from shmarray.kernels.program import Load, Operand, Program, Source
from shmarray.region import Box, IndexMap
from shmarray.tiles import Edges, Grid, block_sizes, blocks

__all__ = ["BlockKernel", "BlockSource", "ForeignSource", "Piece", "PiecesSource"]

NDArray = np.ndarray[Any, Any]
Fill = Callable[[NDArray, Box], None]
MOST_OPEN_ITEMS = 1 << 20  # of scratch that the programs of pieces hold while they are bound: tiles go through pieces in order
MOST_OPEN_PIECES = 1 << 10


@dataclass(frozen=True, slots=True)
class BlockKernel:
    """Writes a source straight into memory, box by box of its own grid."""

    source: Source
    out: Operand
    grid: Grid

    def bind(self, context: Context) -> Callable[[int], None]:
        target = open_window(context, self.out)
        fill = self.source.open(context)

        def run(index: int) -> None:
            at = self.grid.box(index)
            if isinstance(target, Remote):
                out = np.empty([s.stop - s.start for s in at], target.dtype)
                fill(out, at)
                target[at].write(out)
            else:
                fill(target[at], at)

        return run


@dataclass(frozen=True, slots=True, eq=False)
class BlockSource:
    """A block operation; its inputs are memory, or programs computed within the task.

    ``results`` names, per input that is a program, the register that holds it; None: operand 0 of the program as it lies.
    """

    operation: BlockOperation
    inputs: tuple[Program, ...]
    results: tuple[int | None, ...]
    edges: Edges
    line: str

    @property
    def loads(self) -> tuple[Operand, ...]:
        return tuple(operand for program in self.inputs for operand in program.loads)

    def label(self, at: Box) -> str:
        """Name a box of the grid in errors."""
        if not self.operation.isolated:
            return f"part {self.operation.label(at)}"
        return f"chunk {tuple(bisect_right(axis, piece.start, 0, len(axis) - 1) - 1 for axis, piece in zip(self.edges, at, strict=True))}"

    def scratch(self, sizes: tuple[int, ...]) -> int:
        first = tuple(slice(axis[0], axis[1]) for axis in self.edges)
        needs = next(self.operation.rounds(first))
        inner = sum(p.scratch(tuple(s.stop - s.start for s in box)) for p, box in zip(self.inputs, needs, strict=True))
        return self.operation.scratch(first) + inner

    def open(self, context: Context) -> Fill:
        operation = self.operation
        readers = [_reader(program, result, context) for program, result in zip(self.inputs, self.results, strict=True)]

        def fill(out: NDArray, at: Box) -> None:
            try:
                for k, needs in enumerate(operation.rounds(at)):
                    values = tuple([read(box) for read, box in zip(readers, needs, strict=True)])
                    if k:
                        operation.add(out, values, at, k)
                    else:
                        operation.run(out, values, at)
            except Exception as error:  # the layer's name, line and task may be those of what is made of this
                _note(error, f"in {self.label(at)} of {operation.name!r}", self.line)
                raise

        return fill


def _note(error: Exception, where: str, line: str) -> None:
    for note in (where, f"built at {line}") if line else (where,):
        with contextlib.suppress(Exception):  # a class that takes no notes
            if note not in getattr(error, "__notes__", ()):  # the same exception object may be raised by several tasks
                error.add_note(note)


def _reader(program: Program, result: int | None, context: Context) -> Callable[[Box], NDArray]:
    """Return what gives a read-only array of a box of an input."""
    if result is None:
        window = open_window(context, program.operands[0])

        def lay(box: Box) -> NDArray:
            if _is_empty(box):  # of a spilled array, or of the driver's, there is nothing to copy
                return np.empty([s.stop - s.start for s in box], program.operands[0].dtype)
            part = window[box]
            array = part.read() if isinstance(part, Remote) else part.view()
            array.flags.writeable = False
            return array

        return lay
    write = _writer(program, result, context)
    dtype = program.registers[result].dtype

    def compute(box: Box) -> NDArray:
        array = np.empty([s.stop - s.start for s in box], dtype)  # not scratch: a user's function may keep it
        if not _is_empty(box):
            write(array, box)
        array.flags.writeable = False
        return array

    return compute


def _is_empty(box: Box) -> bool:
    return any(piece.stop <= piece.start for piece in box)


def _writer(program: Program, result: int, context: Context) -> Fill:
    """Return what computes a box of register ``result`` of a program into an array."""
    if len(program.steps) == 1 and isinstance(program.steps[0], Load) and not program.made:
        return _copier(program.operands[program.steps[0].operand], context)
    evaluator = Evaluator(program, context, MOST_STAGED_ITEMS + 1)

    def write(out: NDArray, box: Box) -> None:
        evaluator.begin(box)
        with evaluator.errstate():
            for block in blocks(box, block_sizes(tuple(max(n, 1) for n in out.shape))):
                inner: list[Any] = [slice(b.start - s.start, b.stop - s.start) for b, s in zip(block, box, strict=True)]
                np.copyto(out[(*inner, ...)], evaluator.run(block)[result], casting="unsafe")

    return write


def _copier(operand: Operand, context: Context) -> Fill:
    window = open_window(context, operand)
    is_wide = [n != 1 for n in operand.shape]  # else it is broadcast

    def copy(out: NDArray, box: Box) -> None:
        part = window[tuple([piece if wide else slice(0, 1) for piece, wide in zip(box, is_wide, strict=True)])]
        np.copyto(out, part.read() if isinstance(part, Remote) else part)

    return copy


@dataclass(frozen=True, slots=True, eq=False)
class ForeignSource:
    """Something that only the driver can slice (h5py, zarr, ...), from index ``origin`` on."""

    source: Any
    origin: tuple[int, ...]
    dtype: np.dtype[Any]
    edges: Edges
    line: str

    @property
    def loads(self) -> tuple[Operand, ...]:
        return ()

    def label(self, at: Box) -> str:
        """Name a box in errors."""
        return f"part [{', '.join(f'{s.start + o}:{s.stop + o}' for s, o in zip(at, self.origin, strict=True))}]"

    def scratch(self, sizes: tuple[int, ...]) -> int:
        return math.prod(sizes) * self.dtype.itemsize  # what slicing gives, before it is copied

    def open(self, context: Context) -> Fill:
        def fill(out: NDArray, at: Box) -> None:
            key = tuple([slice(s.start + o, s.stop + o) for s, o in zip(at, self.origin, strict=True)])
            try:
                part = np.asarray(self.source[key])
                if part.shape != out.shape:
                    raise ValueError(f"slicing {type(self.source).__name__} with {at} gave shape {part.shape}, expected {out.shape}")
            except Exception as error:
                _note(error, f"in {self.label(at)} of 'read {type(self.source).__name__}'", self.line)
                raise
            np.copyto(out, part, casting="unsafe")

        return fill


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an array put together: register ``result`` of a program goes where ``map`` says."""

    program: Program
    result: int
    map: IndexMap


@dataclass(frozen=True, slots=True, eq=False)
class PiecesSource:
    """An array of pieces, later ones over earlier ones: each that meets a box is computed straight into its part of it."""

    pieces: tuple[Piece, ...]
    ndim: int
    edges: Edges | None  # None: any box may be asked for

    @property
    def loads(self) -> tuple[Operand, ...]:
        return tuple(operand for piece in self.pieces for operand in piece.program.loads)

    def scratch(self, sizes: tuple[int, ...]) -> int:
        # A piece has its axes in an order of its own, and not more of a tile than all.
        return max((p.program.scratch((math.prod(sizes),)) for p in self.pieces if p.program.made), default=0)

    def open(self, context: Context) -> Fill:
        straight = tuple((a, 1) for a in range(self.ndim))
        parts = [_straight_part if piece.map.axes == straight else _part for piece in self.pieces]
        meeting = _finder([piece.map.bounds() for piece in self.pieces], self.ndim)
        opened: OrderedDict[int, tuple[Fill, int]] = OrderedDict()  # the latest used last, with the items of its scratch
        total = 0

        def fill(out: NDArray, at: Box) -> None:
            nonlocal total
            for k in meeting(at):
                part = parts[k](self.pieces[k].map, at, out)
                if part is None:
                    continue
                box, target = part
                write, items = opened.pop(k, (None, 0))
                if write is None:
                    write = _writer(self.pieces[k].program, self.pieces[k].result, context)
                total += max(items, target.size) - items
                opened[k] = write, max(items, target.size)
                while len(opened) > 1 and (total > MOST_OPEN_ITEMS or len(opened) > MOST_OPEN_PIECES):
                    total -= opened.popitem(last=False)[1][1]
                write(target, box)

        return fill


def _finder(bounds: list[tuple[list[int], list[int]]], ndim: int) -> Callable[[Box], list[int]]:
    """Return what gives the numbers of the pieces whose bounds meet a box, ascending.

    Pieces laid one after the other along an axis are found by bisection, however many there are.
    """
    if len(bounds) <= 4 or not ndim:
        everything = list(range(len(bounds)))
        return lambda at: everything
    lows = np.array([low for low, _ in bounds])
    highs = np.array([high for _, high in bounds])
    ordered = [a for a in range(ndim) if (np.diff(lows[:, a]) >= 0).all() and (np.diff(highs[:, a]) >= 0).all()]
    along = max(ordered, key=lambda a: len(np.unique(lows[:, a])), default=None)

    def meeting(at: Box) -> list[int]:
        first, last = 0, len(bounds)
        if along is not None:
            first = int(np.searchsorted(highs[:, along], at[along].start, "right"))
            last = int(np.searchsorted(lows[:, along], at[along].stop, "left"))
        starts, stops = [s.start for s in at], [s.stop for s in at]
        meets = ((lows[first:last] < stops) & (highs[first:last] > starts)).all(axis=1)
        found: list[int] = (np.flatnonzero(meets) + first).tolist()
        return found

    return meeting


def _straight_part(map: IndexMap, at: Box, out: NDArray) -> tuple[Box, NDArray] | None:
    """Return what `_part` does, for a piece whose axes are those of the array: there may be thousands to a tile."""
    box, place = [], []
    for n, offset, piece in zip(map.shape, map.offsets, at, strict=True):
        low, high = max(piece.start, offset), min(piece.stop, offset + n)
        if low >= high:
            return None
        box.append(slice(low - offset, high - offset))
        place.append(slice(low - piece.start, high - piece.start))
    return tuple(box), out[tuple(place)]


def _part(map: IndexMap, at: Box, out: NDArray) -> tuple[Box, NDArray] | None:
    """Return the box of a piece that goes into the box ``at``, and its place in ``out``, an array of that; None: no element."""
    box: list[slice] = []
    places: list[Any] = [slice(o - s.start, o - s.start + 1) for o, s in zip(map.offsets, at, strict=True)]
    for n, (axis, step) in zip(map.shape, map.axes, strict=True):
        if axis < 0:
            box.append(slice(0, n))
            continue
        start, stop, first = at[axis].start, at[axis].stop, map.offsets[axis]
        if n == 1:
            step = 1
        if step > 0:
            low, high = max(0, -((first - start) // step)), min(n, -((first - stop) // step))
        else:
            low, high = max(0, (first - stop) // -step + 1), min(n, (first - start) // -step + 1)
        if low >= high:
            return None
        begin, end = first + step * low - start, first + step * (high - 1) - start
        places[axis] = slice(begin, end + 1, step) if step > 0 else slice(begin, end - 1 if end else None, step)
        box.append(slice(low, high))
    moved = [axis for axis, _ in map.axes if axis >= 0]
    for axis, (piece, offset) in enumerate(zip(at, map.offsets, strict=True)):
        if axis not in moved and not piece.start <= offset < piece.stop:
            return None
    gone = tuple(slice(None) if axis in moved else 0 for axis in range(len(at)))
    order = np.argsort(np.argsort(moved)).tolist() if moved else []
    new = tuple(slice(None) if axis >= 0 else None for axis, _ in map.axes)
    return tuple(box), out[(*places, ...)][(*gone, ...)].transpose(order)[(*new, ...)]
